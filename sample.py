"""Sampling: Euler steps from noise to video, with classifier-free guidance (4.1, appendix C).

    python sample.py --prompt "a red circle moving left"      a GIF, a PNG and the true scores
    python sample.py --nrg 1,1,0.5                            the same without and with Flow-NRG

Time runs from t = 1 to 0, shifted towards noise as in training; docs/paper.md says why these
settings.
"""

import re
from pathlib import Path

import numpy as np
import torch

import flags
import world
from data import Vocabulary
from flow import TIME_SHIFT, sampling_times
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from pictures import write_gif, write_sheet
from runtime import cli
from runtime.checkpoint import WEIGHTS, check_same_data
from runtime.cli import BadInput

STEPS = 20
CFG = 2.0
# Flow-NRG on rewards of unit spread; docs/nrg.md has the measurements
NRG_SCALE, NRG_EPS, NRG_INTERVAL = 16.0, 0.1, (0.0, 0.95)
PROMPT = "a red circle moving left"
# The first prompt of the evaluation set that not all four base clips of seed 0 follow
NRG_PROMPT = "a yellow cross moving right"


@torch.no_grad()
def sample(model, x1, y, steps=STEPS, cfg=1.0, null=None, guidance=None, shift=TIME_SHIFT):
    """Noise x1 (B, C, T, H, W) and prompts y (B, S) -> videos x0.

    cfg 1 is the conditional model alone; otherwise v = v_null + cfg (v_y - v_null), with `null` the
    ids of no prompt (default: zeros). guidance(v, x_t, t, y) -> v is applied after CFG (appendix
    C). ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    null = torch.zeros_like(y) if null is None else null
    times = sampling_times(steps, shift).tolist()  # 1 ... 0
    x = x1
    for t_now, t_next in zip(times[:-1], times[1:]):
        t = torch.full((len(x),), t_now, device=x.device)
        v = model(x, t, y)
        if cfg != 1.0:
            v_null = model(x, t, null)
            v = v_null + cfg * (v - v_null)
        if guidance is not None:
            v = guidance(v, x, t, y)
        x = x - (t_now - t_next) * v  # Euler, appendix C
    return x


def sample_many(model, x1, y, progress=lambda starts: starts, batch=64, sampler=sample, **settings):
    """What `sampler` returns, on the CPU, made in batches; with a progress bar if one is given."""
    parts = []
    for start in progress(range(0, len(x1), batch)):
        part = slice(start, start + batch)
        parts.append(sampler(model, x1[part], y[part], **settings).cpu())
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------
# The command


def arguments(argv=None):
    about = "Samples clips of one prompt and prints their true scores (1 = clean clip, 0 = bad)."
    parser = flags.Parser(about)
    add = parser.add_argument
    add("--prompt", help=f"words that the model knows (default: {PROMPT}; --nrg {NRG_PROMPT})")
    add("--ckpt", type=Path, default=WEIGHTS / "base.pt", help="weights of a video model")
    add("--n", type=flags.clip_count, default=4, help="clips")
    add("--steps", type=flags.positive_int, default=STEPS, help="Euler steps")
    add("--cfg", type=flags.finite, default=CFG, help="scale of classifier-free guidance; 1 = off")
    add("--attention", help="full, or tile:T,H,W for sliding tiles (default: the model's)")
    add("--seed", type=flags.seed, default=0, help="one seed, one set of clips, on every device")
    add("--out", type=Path, default=Path("out/sample"), help="folder to write to")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    group = "reward guidance (Flow-NRG, section 4.4), beside the same clips without it"
    add = parser.add_argument_group(group).add_argument
    add("--nrg", type=flags.triple, help="weights of VQ, MQ and TA of any sign, as in 1,1,0.5")
    add("--nrg-ckpt", type=Path, default=WEIGHTS / "nrg.pt", help="weights of a noise-aware reward")
    add("--nrg-scale", type=flags.finite, default=NRG_SCALE, help="w of Eq. 11, for unit spread")
    about = "of t / (1 - t + eps); 0 = the paper's form"
    add("--nrg-eps", type=flags.non_negative, default=NRG_EPS, help=about)
    times = "{:g},{:g}".format(*NRG_INTERVAL)
    add("--nrg-interval", type=flags.interval, default=times, help="lowest and highest guided t")
    args = parser.parse_args(argv)
    if args.prompt is None:
        args.prompt = NRG_PROMPT if args.nrg else PROMPT
    return args


def main():
    args = arguments()
    device = cli.pick_device(args.device)
    model, words = load_velocity(args.ckpt, args.attention)
    vocabulary = Vocabulary(words)
    is_latent = model.config.channels != 3
    attributes = None  # the oracle knows neither latents nor a vocabulary of real prompts
    try:
        y = vocabulary.encode([args.prompt] * args.n, model.config.max_text)
        if not is_latent and not vocabulary.open:
            attributes = world.prompt_attributes([args.prompt] * args.n)
    except ValueError as error:
        raise BadInput(f"--prompt: {error}") from None
    if vocabulary.open:
        print(f"prompt: {vocabulary.coverage([args.prompt], model.config.max_text)}")
    rng = torch.Generator().manual_seed(args.seed)
    x1 = torch.randn(args.n, *model.config.video_shape, generator=rng).to(device)
    y = y.to(device)
    model = model.to(device)

    name = re.sub(r"[^\w]+", "-", args.prompt.lower())[:80]
    plain = f"CFG {args.cfg:g}"
    policies = {plain: (model, args.cfg)}
    if args.nrg:
        reward, reward_words = load_noisy_reward(args.nrg_ckpt)
        check_same_data("--nrg-ckpt", reward.config, reward_words, "--ckpt", model.config, words)
        settings = args.nrg, args.nrg_scale, args.nrg_eps, args.nrg_interval
        steered = SteeredPolicy(model, reward.to(device), *settings, args.cfg)
        weights = ",".join(f"{weight:g}" for weight in args.nrg)
        policies[f"{plain} NRG {weights}"] = (steered, 1.0)  # CFG is inside
        name += "-nrg"

    clips = {}  # label of a row: (n, C, T, H, W)
    for label, (velocity, cfg) in policies.items():
        clips[label] = sample_many(velocity, x1, y, steps=args.steps, cfg=cfg)
        if not clips[label].isfinite().all():
            fault = "the samples are not finite numbers"
            raise BadInput(f"{fault}; give a smaller --nrg, --nrg-scale or --cfg")
    if attributes is not None:
        scores = {label: world.oracle(videos, attributes) for label, videos in clips.items()}
        print_scores(args.prompt, scores)
    write_clips(args.out / name, clips, is_latent)


def print_scores(prompt, scores):
    """The table of true scores: {label of a row: (n, 3)}."""
    width = max(map(len, scores))
    print(f"true scores of {prompt!r} (1 = clean clip)")
    print(f"{'':{width}} {'clip':>4} {'VQ':>6} {'MQ':>6} {'TA':>6}")
    for label, table in scores.items():
        for i, row in [*enumerate(table.tolist()), ("mean", table.mean(0).tolist())]:
            print(f"{label:{width}} {i:>4} " + " ".join(f"{value:6.2f}" for value in row))


def write_clips(path, clips, is_latent):
    """Writes {label of a row: clips} as a GIF and a PNG, or latents as one .npy."""
    videos = list(clips.values())
    labels = list(clips) if len(clips) > 1 else []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_latent:
            np.save(f"{path}.npy", torch.stack(videos).numpy())
            print(f"wrote {path}.npy")
            return
        write_gif(f"{path}.gif", videos, labels=labels)
        versions = torch.stack(videos, 1)  # (n, rows, ...): the versions of a clip together
        write_sheet(f"{path}.png", versions.flatten(0, 1), labels=labels * len(versions))
    except OSError as error:
        raise BadInput(f"cannot write to {path.parent}: {error.strerror}") from None
    rows = f"; rows: {', '.join(labels)}" if labels else ""
    print(f"wrote {path}.gif and .png{rows}")


if __name__ == "__main__":
    cli.run(main)

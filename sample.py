"""Sampling: Euler steps from noise to video, with classifier-free guidance (paper, section 4.1 and appendix C).

    python sample.py --prompt "a red circle moving left"      writes a GIF and a PNG, prints the true scores
    python sample.py --nrg 1,1,0.5                            the same clips without and with reward guidance

Time runs from t = 1 to 0, shifted towards noise as in training; docs/paper.md says why these settings.
"""

import re

import numpy as np
import torch

import world
from data import Vocabulary
from flow import TIME_SHIFT, shift_time
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from real_data.video import write_gif, write_sheet
from runtime.checkpoint import check_same_data
from runtime.cli import BadInput, pick_device, run
from runtime.flags import sampling_flags

STEPS = 20
CFG = 2.0
NRG_SCALE, NRG_EPS, NRG_INTERVAL = (
    16.0,
    0.1,
    (0.0, 0.95),
)  # on rewards of unit spread, measured in docs/nrg.md


@torch.no_grad()
def sample(model, x1, y, steps=STEPS, cfg=1.0, null=None, guidance=None, shift=TIME_SHIFT):
    """Noise x1 (B, C, T, H, W) and prompts y (B, S) -> videos x0.

    cfg 1 is the conditional model alone; otherwise v = v_null + cfg (v_y - v_null), with `null` the ids of no prompt
    (default: zeros). guidance(v, x_t, t, y) -> v is applied after CFG (appendix C). ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    null = torch.zeros_like(y) if null is None else null
    times = shift_time(torch.linspace(1, 0, steps + 1), shift).tolist()  # 1 ... 0
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


def sample_many(model, x1, y, progress=lambda starts: starts, batch=64, **settings):
    """`sample` in batches, with a progress bar if one is given."""
    parts = []
    for start in progress(range(0, len(x1), batch)):
        part = slice(start, start + batch)
        parts.append(sample(model, x1[part], y[part], **settings))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------
# The command


def main():
    args = sampling_flags(STEPS, CFG, NRG_SCALE, NRG_EPS, NRG_INTERVAL)
    device = pick_device(args.device)
    model, words = load_velocity(args.ckpt, args.attention)
    latent = model.config.channels != 3
    try:
        vocabulary = Vocabulary(words)
        y = vocabulary.encode([args.prompt] * args.n, model.config.max_text)
        # the oracle knows neither latents nor a vocabulary of real prompts: no scores
        toy = not (latent or vocabulary.open)
        attributes = (
            world.prompt_attributes([vocabulary.decode(row) for row in y.tolist()]) if toy else None
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    if vocabulary.open:
        print(f"prompt: {vocabulary.coverage([args.prompt], model.config.max_text)}")
    x1 = torch.randn(
        args.n, *model.config.video_shape, generator=torch.Generator().manual_seed(args.seed)
    )
    x1, y, model = x1.to(device), y.to(device), model.to(device)

    runs = {}  # label of a row: (velocity model, cfg)
    if args.compare:
        runs["CFG 1"] = model, 1.0
    runs[f"CFG {args.cfg:g}"] = model, args.cfg
    if args.nrg is not None:
        reward, reward_words = load_noisy_reward(args.nrg_ckpt)
        check_same_data("--nrg-ckpt", reward.config, reward_words, "--ckpt", model.config, words)
        settings = args.nrg, args.nrg_scale, args.nrg_eps, args.nrg_interval
        steered = SteeredPolicy(model, reward.to(device), *settings, args.cfg)
        weights = ",".join(f"{weight:g}" for weight in args.nrg)
        runs[f"CFG {args.cfg:g} NRG {weights}"] = steered, 1.0  # it has CFG of its own
    videos, scores = [], []
    for velocity, cfg in runs.values():
        video = sample_many(velocity, x1, y, steps=args.steps, cfg=cfg).cpu()
        if not video.isfinite().all():
            raise BadInput(
                "the samples are not finite numbers; give a smaller --nrg, --nrg-scale or --cfg"
            )
        videos.append(video)
        if attributes is not None:
            scores.append(world.oracle(video, attributes))

    name = re.sub(r"[^\w]+", "-", args.prompt.lower())[:80]
    name += "-nrg" * (args.nrg is not None) + "-compared" * args.compare
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if latent:
            np.save(
                args.out / f"{name}.npy", torch.stack(videos).numpy()
            )  # (runs, clips, C, T, H, W)
        else:
            write_gif(args.out / f"{name}.gif", videos)
            write_sheet(
                args.out / f"{name}.png", torch.stack(videos, 1).flatten(0, 1)
            )  # a clip's versions together
    except OSError as error:
        raise BadInput(f"cannot write to {args.out}: {error.strerror}") from None
    width = max(map(len, runs))
    if scores:
        print(
            f"true scores of {args.prompt!r}\n{'':{width}} {'clip':>4} {'VQ':>6} {'MQ':>6} {'TA':>6}"
        )
    for label, table in zip(runs, scores):
        for i, row in [*enumerate(table.tolist()), ("mean", table.mean(0).tolist())]:
            print(f"{label:{width}} {i:>4} " + " ".join(f"{value:6.2f}" for value in row))
    order = f"; rows: {', '.join(runs)}" if len(runs) > 1 else ""
    print(f"wrote {args.out / name}{'.npy' if latent else '.gif and .png'}{order}")


if __name__ == "__main__":
    run(main)

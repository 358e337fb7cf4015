"""Flow-DPO, Flow-RWR, SFT and Flow-NRG on an open video model: diffusers' Wan (section 4).

    pip install diffusers                           for this folder alone; tested with 0.42.1
    python examples/wan.py --tiny dpo --steps 20    a random model of 0.04 M parameters: seconds
    python examples/wan.py --model WAN --data PAIRS dpo --steps 2000
    torchrun --nproc_per_node 8 examples/wan.py --model WAN --data PAIRS dpo --batch 64 --accum 8

Losses, training loop, reward head, guidance and sampler are the toy's own. What differs is in
wan_model.py and latents.py: Wan takes latents of its VAE and embeddings of its text encoder, both
computed beforehand (README.md); its clock runs to 1000; only adapters are trained.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's modules, from any folder

from data import DIMENSIONS, draw_noise, epoch_index, mean_one, step_rng, take
from examples import latents
from flow import interpolate
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from lora import lora_disabled
from nrg import guide, noisy_pair_step
from ranking import winners
from reward import decided
from runtime import cli, distributed, resume
from runtime.checkpoint import check_fit, load_checkpoint
from runtime.cli import BadInput, finite, positive, positive_int
from runtime.config import flag, parse
from sample import NRG_EPS, NRG_INTERVAL, sample
from settings import Training
from trainer import Task, fit

try:
    import accelerate  # noqa: F401, diffusers loads weights by it

    from examples import wan_model
    from examples.wan_model import Velocity, WanReward
except (ImportError, RuntimeError) as error:  # RuntimeError: a package of diffusers does not load
    need = "diffusers is needed: pip install diffusers accelerate"
    print(f"wan.py: error: {need} ({str(error).partition(chr(10))[0]})", file=sys.stderr)
    sys.exit(2)

COMMANDS = ("dpo", "rwr", "sft", "nrg", "sample")
TINY = ["--precision=float32", "--lr=1e-3", "--rank=4", "--batch=8", "--n=8", "--beta=10"]


@dataclass
class Wan(Training):
    """dpo, rwr, sft, nrg or sample on Wan: one of these words, and flags"""

    algo: str = ""
    steps: int = 50  # of the optimiser, or Euler steps of sample
    batch: int = 1
    lr: float = 5e-6
    save_every: int = 100
    out: Path = Path("out/wan")
    tiny: bool = flag(False, "a random model, made-up pairs, and defaults for them")
    model: Path = flag(None, "folder of Wan in diffusers' format, or of its transformer", Path)
    data: Path = flag(None, "folder of pairs (examples/latents.py)", Path, file=True)
    lora: Path = flag(None, "adapters to start from or to sample with", Path, file=True)
    rank: int = flag(64, "of new adapters", positive_int)
    beta: float = flag(500.0, "dpo: larger stays closer to the reference", positive)
    shift: float = flag(3.0, "of t towards noise, except in nrg; 5 at 720 lines", positive)
    n: int = flag(1, "sample: clips", positive_int)
    cfg: float = flag(5.0, "sample: classifier-free guidance; 1 = off", finite)
    nrg: tuple = flag(None, "sample: weights of VQ, MQ and TA, for example 1,1,0.5", cli.triple)
    nrg_scale: float = flag(100.0, "sample: w of Eq. 11", finite, needs=("nrg",))
    reward: Path = flag(None, "sample: what nrg wrote (default: OUT/nrg/last.pt)", Path)


def settings_of(words):
    """The settings of a command line, in which the algorithm stands without its flag."""
    words = [f"--algo={word}" if word in COMMANDS else word for word in words]
    defaults = ["--lr=1e-3"] if "--algo=nrg" in words else []
    defaults += TINY if "--tiny" in words else []
    settings, unknown = parse(Wan, defaults + words)
    unread = ["compile", "ema", "export", "fsdp", "plan"]
    if settings.algo == "nrg":
        unread.append("lora")  # the reward reads the model without adapters
    unknown += [f"--{name}" for name in unread if getattr(settings, name)]
    if settings.algo not in COMMANDS:
        raise BadInput(f"give one of {', '.join(COMMANDS)}; --help lists the flags")
    if unknown:
        raise BadInput(f"{unknown[0]}: not read by {settings.algo}; --help lists the flags")
    if settings.tiny:
        settings.model, settings.data = settings.out / "tiny", settings.out / "tiny" / "pairs"
    if not settings.model or not settings.data:
        raise BadInput("--model and --data are needed; --tiny tries the commands without")
    settings.data /= "pairs.csv"
    return settings


def alignment_task(wan, pairs, settings, device):
    """SFT, Flow-RWR or Flow-DPO of new adapters. Those of --lora become part of the frozen weights,
    and so of Flow-DPO's reference."""
    initial = wan_model.merge_adapters(wan, settings.lora) if settings.lora else {}
    wan_model.add_adapters(wan, settings.rank)  # drawn on the CPU: the same on every device
    policy = Velocity(wan.to(device))
    reward = pairs.scores.mean(2)  # (N, 2), r = (VQ + MQ + TA) / 3 (section 5.2)
    pair, side = winners(reward)
    weight = torch.ones(len(pair))
    if settings.algo == "rwr":
        pair, side = torch.cat((pair, pair)), torch.cat((side, 1 - side))
        weight = rwr_weights(reward[pair, side])

    def reference(x_t, t, y):
        with lora_disabled(wan):
            return policy(x_t, t, y)

    def batch(step, rows):
        index = epoch_index(len(pair), settings.batch, step, settings.seed)[rows]
        rng = step_rng(settings.seed, step)
        noise = take(draw_noise(settings.batch, pairs.shape, settings.shift, rng), rows)
        y, x0 = pairs.texts(pair[index]), pairs.clips(pair[index], side[index])
        if settings.algo == "dpo":
            x0_l = pairs.clips(pair[index], 1 - side[index])
            return {"x0_w": x0, "x0_l": x0_l, "y": y, **noise}
        return {"x0": x0, "y": y, "weight": weight[index], **noise}

    def loss(batch):
        if settings.algo == "dpo":
            return flow_dpo_step(policy, reference, **batch, beta=settings.beta)
        return flow_rwr_step(policy, **batch)

    def evaluate(_, out):
        path = out.with_suffix(".safetensors")
        wan_model.write_adapters(wan, initial, path)
        return [f"wrote {path}"]

    return Task(f"wan {settings.algo}", policy, [], batch, loss, ("loss", "accuracy"), evaluate)


def reward_task(wan, pairs, settings, device):
    """A noise-aware reward for Flow-NRG, by Bradley-Terry on the clips of each pair (4.4)."""
    reward = WanReward(wan).to(device)
    label = (pairs.scores[:, 0] - pairs.scores[:, 1]).sign().long()  # (N, 3)

    def batch(step, rows):
        index = epoch_index(len(label), settings.batch, step, settings.seed)
        whole = {"label": label[index], "weight": mean_one(decided(label[index]))}
        whole |= draw_noise(settings.batch, pairs.shape, 1.0, step_rng(settings.seed, step))
        own, first = index[rows], torch.zeros_like(index[rows])
        x0_a, x0_b = pairs.clips(own, first), pairs.clips(own, 1 - first)
        return {"x0_a": x0_a, "x0_b": x0_b, "y": pairs.texts(own), **take(whole, rows)}

    def loss(batch):
        return noisy_pair_step(reward, **batch)

    @torch.no_grad()
    def evaluate(_, out):
        """Scores are divided by their spread: guidance takes rewards of unit spread."""
        scores = []
        for step in range(64):
            one = {name: value.to(device) for name, value in batch(step, slice(0, 1)).items()}
            for x0 in (one["x0_a"], one["x0_b"]):
                scores.append(reward(interpolate(x0, one["x1"], one["t"]), one["t"], one["y"]))
        reward.std.copy_(torch.cat(scores).std(0).clamp(min=1e-6))
        return []

    return Task("wan nrg", reward, [], batch, loss, ("loss", *DIMENSIONS), evaluate)


def train(wan, pairs, settings, device):
    """Writes OUT/ALGO/last.pt, which --resume reads, and adapters to OUT/ALGO.safetensors."""
    settings.out /= settings.algo
    distributed.check_flags(settings)
    with distributed.process_0_first():
        if not resume.resumes(settings):  # a new run takes the place of an old one
            (settings.out / "last.pt").unlink(missing_ok=True)
        state = resume.opened_run(settings)
    torch.manual_seed(settings.seed)
    make_task = reward_task if settings.algo == "nrg" else alignment_task
    task = make_task(wan, pairs, settings, device)
    wan.to(device).enable_gradient_checkpointing()
    is_main = distributed.rank() == 0
    if is_main and state is None and settings.algo == "dpo":
        check_start(task, device)
    lines = fit(task, settings, device, state)
    if is_main:
        last = json.loads((settings.out / "metrics.jsonl").read_text().splitlines()[-1])
        print(f"{settings.algo}: loss {last['loss']:.4f} at step {last['step']}", *lines, sep="\n")


@torch.no_grad()
def check_start(task, device):
    """Prints the loss of the first pair. It is ln 2 if the policy starts at its reference."""
    first = {name: value.to(device) for name, value in task.batch(0, slice(0, 1)).items()}
    loss, logs = task.loss(first)
    print(f"dpo: first loss {loss:.4f}, accuracy {logs['accuracy']:.2f}")
    if abs(loss - math.log(2)) > 1e-3:
        print("dpo: that is not ln 2 = 0.6931: the policy does not start at its reference")


@torch.no_grad()
def draw(wan, pairs, settings, device):
    """Writes latents for the first prompts, without and with guidance by a reward."""
    if settings.lora:
        wan_model.merge_adapters(wan, settings.lora)
    wan.to(device).enable_gradient_checkpointing()
    y = pairs.texts(torch.arange(settings.n) % len(pairs.files)).to(device)
    x1 = torch.randn(settings.n, *pairs.shape, generator=step_rng(settings.seed, 0)).to(device)
    null = pairs.null.expand_as(y).to(device)
    guidances = {"plain": None}
    if settings.nrg:
        path = settings.reward or settings.out / "nrg" / "last.pt"
        state = load_checkpoint(path, "wan nrg")
        if not state["evaluated"]:
            raise BadInput(f"{path}: its training has not ended; --resume it first")
        bare = wan_model.load_transformer(settings.model)  # the reward's, without adapters
        reward = WanReward(bare.to(device)).to(device).requires_grad_(False)
        check_fit(reward, state["model"], path)
        reward.load_state_dict(state["model"])
        guidances["guided"] = guide(reward, settings.nrg, settings.nrg_scale, NRG_EPS, NRG_INTERVAL)
    for name, guidance in guidances.items():
        steps, cfg, shift = settings.steps, settings.cfg, settings.shift
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            x0 = sample(Velocity(wan), x1, y, steps, cfg, null, guidance, shift)
            scores = reward(x0, torch.zeros(len(x0), device=device), y) if settings.nrg else None
        np.save(settings.out / f"{name}.npy", x0.cpu().numpy())
        print(f"wrote {settings.out / name}.npy")
        if settings.nrg:
            means = zip(DIMENSIONS, scores.mean(0).tolist())
            print("learned reward", *(f"{dimension} {mean:.2f}" for dimension, mean in means))


def main():
    settings = settings_of(sys.argv[1:])
    device = distributed.start_process(settings.device)
    cli.check_writable(settings.out, "--out")
    with distributed.process_0_first():
        if settings.tiny and distributed.rank() == 0:
            wan_model.write_tiny(settings.model)
            latents.write_tiny(settings.data.parent)
    wan = wan_model.load_transformer(settings.model)
    pairs = latents.read_pairs(settings.data, wan.config)
    command = draw if settings.algo == "sample" else train
    command(wan, pairs, settings, device)
    distributed.stop_process()


if __name__ == "__main__":
    cli.run(main)

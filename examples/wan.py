"""Flow-DPO, Flow-RWR, SFT and Flow-NRG on an open video model: diffusers' Wan text-to-video transformer (section 4).

    pip install diffusers                                  for this folder alone; tested with 0.42.1
    python examples/wan.py --tiny dpo --steps 20           a random model of 0.04 M parameters, made-up pairs: seconds
    python examples/wan.py --model FOLDER --data FOLDER dpo --steps 2000

Losses, reward head, guidance and sampler are the toy's own, unmodified: they know v = model(x_t, t, y) and no more.
What differs is in wan_model.py and latents.py: Wan works on latents of its VAE and, for words, on embeddings of its
text encoder, both made beforehand (README.md); its clock runs to 1000; only adapters are trained.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's modules, from wherever this is started

from data import DIMENSIONS, draw_noise, epoch_index, step_rng
from examples import latents, wan_model
from examples.wan_model import WanReward, velocity
from flow import interpolate
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from lora import lora_disabled
from nrg import guide, noisy_pair_step
from runtime.checkpoint import check_fit
from runtime.cli import BadInput, Parser, pick_device, progress_bar, run, seed, triple
from sample import NRG_EPS, NRG_INTERVAL, sample
from train import ranked

# ---------------------------------------------------------------------------------------------------------------------
# Training


def noise_like(x0, shift, rng):
    """{"t", "x1"} for clips x0. Drawn on the CPU and moved: one seed, one noise, on every device."""
    return {name: value.to(x0.device) for name, value in draw_noise(len(x0), x0.shape[1:], shift, rng).items()}


def dpo(wan, pairs, args):
    """(loss(index, rng) -> (loss, logs), how many items there are for index (B,) to choose from); so all three."""
    policy, (better, worse) = velocity(wan), ranked(pairs.total)  # (N', 2: pair, side) each

    def reference(x_t, t, y):
        with lora_disabled(wan):
            return policy(x_t, t, y)

    def loss(index, rng):
        x0_w, x0_l, y = pairs.clips(better[index]), pairs.clips(worse[index]), pairs.texts(better[index])
        return flow_dpo_step(policy, reference, x0_w, x0_l, y, **noise_like(x0_w, args.shift, rng), beta=args.beta)

    return loss, len(better)


def rwr(wan, pairs, args):
    better, worse = ranked(pairs.total)
    clips = better if args.algo == "sft" else torch.cat((better, worse))
    weight = torch.ones(len(clips)) if args.algo == "sft" else rwr_weights(pairs.total[clips[:, 0], clips[:, 1]])

    def loss(index, rng):
        x0, y = pairs.clips(clips[index]), pairs.texts(clips[index])
        return flow_rwr_step(velocity(wan), x0, y, weight[index].to(x0.device), **noise_like(x0, args.shift, rng))

    return loss, len(clips)


def nrg(reward, pairs, args):
    label = (pairs.scores[:, 0] - pairs.scores[:, 1]).sign().long()  # (N, 3)

    def loss(index, rng):
        a, b = (torch.stack((index, torch.full_like(index, side)), 1) for side in (0, 1))
        x0_a, x0_b, y = pairs.clips(a), pairs.clips(b), pairs.texts(a)
        return noisy_pair_step(reward, x0_a, x0_b, y, label[index].to(y.device), **noise_like(x0_a, 1.0, rng))

    return loss, len(label)


ALGORITHMS = {"dpo": dpo, "rwr": rwr, "sft": rwr, "nrg": nrg}


def train(module, pairs, args, save):
    """Adam on what `module` leaves trainable; prints the first batch's loss before and after, noise and times alike."""
    loss, count = ALGORITHMS[args.algo](module, pairs, args)
    trained = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0.0)

    def at(step):
        return loss(epoch_index(count, args.batch, step, args.seed), step_rng(args.seed, step))[0]

    with torch.no_grad():
        before = at(0).item()
    for step in progress_bar(args.algo, "step")(range(args.steps)):
        value = at(step)
        if not torch.isfinite(value):
            raise BadInput(f"the loss is {value.item()} at step {step}; a smaller --lr may help")
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            save()
    with torch.no_grad():
        print(f"{args.algo}: loss of the first batch {before:.4f}, after {args.steps} steps {at(0).item():.4f}")


def measure_spread(reward, pairs, seed, most=64):
    """Sets reward.std, by which scores are divided: guidance takes rewards of unit spread."""
    rng, scores = step_rng(seed, -1), []
    with torch.no_grad():
        for pair in range(min(len(pairs.files), most)):
            both = torch.tensor([[pair, 0], [pair, 1]])
            x0 = pairs.clips(both)
            noise = noise_like(x0, 1.0, rng)
            scores.append(reward(interpolate(x0, **noise), noise["t"], pairs.texts(both)))
        reward.std.copy_(torch.cat(scores).std(0).clamp(min=1e-6))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def draw(wan, pairs, args):
    """Latents of the first pairs' prompts, without and with guidance by a reward, for the VAE to decode."""
    chosen = torch.stack((torch.arange(args.n) % len(pairs.files), torch.zeros(args.n, dtype=torch.int64)), 1)
    y, null = pairs.texts(chosen), pairs.load([pairs.null] * args.n)
    x1 = torch.randn(pairs.clips(chosen).shape, generator=step_rng(args.seed, 0)).to(pairs.device)
    runs = {"plain": None}
    if args.nrg:
        tensors, _ = wan_model.read_safetensors(args.reward)
        reward = WanReward(wan).to(pairs.device).requires_grad_(False)
        check_fit(reward, tensors, args.reward)
        reward.load_state_dict(tensors)
        runs["guided"] = guide(reward, args.nrg, args.nrg_scale, NRG_EPS, NRG_INTERVAL)
    for name, guidance in runs.items():
        x0 = sample(velocity(wan), x1, y, args.steps, args.cfg, null, guidance, args.shift)
        latents.write_latents(x0, args.out / f"{name}.npy")
        line = f"wrote {args.out / name}.npy"
        if args.nrg:
            with torch.no_grad():
                scores = reward(x0, torch.zeros(args.n, device=pairs.device), y).mean(0).tolist()
            line += "; learned reward " + " ".join(f"{name} {value:.2f}" for name, value in zip(DIMENSIONS, scores))
        print(line)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def arguments(argv=None):
    parser = Parser("Aligns diffusers' Wan text-to-video transformer by LoRA, trains a reward on it, samples from it.")
    parser.add_argument("algo", choices=(*ALGORITHMS, "sample"), help="what to do")
    parser.add_argument("--tiny", action="store_true", help="a random model, made-up pairs, and defaults for them")
    parser.add_argument("--model", type=Path, help="folder of Wan in diffusers' format, or of its transformer")
    parser.add_argument("--data", type=Path, help="folder of pairs (examples/latents.py)")
    parser.add_argument("--out", type=Path, default=Path("out/wan"), help="folder to write to")
    parser.add_argument("--lora", type=Path, help="adapters to go on from, or to sample with")
    parser.add_argument("--rank", type=int, default=64, help="of new adapters")
    parser.add_argument("--steps", type=int, default=50, help="optimiser steps, or Euler steps of sample")
    parser.add_argument("--batch", type=int, default=1, help="pairs a step; clips with rwr and sft")
    parser.add_argument("--lr", type=float, default=5e-6, help="learning rate; with nrg 1e-3")
    parser.add_argument("--beta", type=float, default=500.0, help="dpo: larger stays closer to the reference")
    parser.add_argument("--shift", type=float, default=3.0, help="of t towards noise, but in nrg; 5 at 720 lines")
    parser.add_argument("--n", type=int, default=1, help="sample: clips")
    parser.add_argument("--cfg", type=float, default=5.0, help="sample: scale of classifier-free guidance; 1 = off")
    parser.add_argument("--nrg", type=triple, help="sample: weights of VQ, MQ and TA, for example 1,1,0.5")
    parser.add_argument("--nrg-scale", type=float, default=100.0, help="sample: w of Eq. 11")
    parser.add_argument("--reward", type=Path, help="sample: what nrg wrote (default: OUT/nrg.safetensors)")
    parser.add_argument("--seed", type=seed, default=0, help="of adapters, order, noise and times")
    parser.add_argument("--device", default="auto", help="auto (cuda, mps, cpu) or a torch device")
    args = parser.parse_args(argv)
    if args.algo == "nrg" or args.tiny:
        parser.set_defaults(lr=1e-3)
    if args.tiny:
        parser.set_defaults(rank=4, batch=8, n=8, beta=10.0)
    args = parser.parse_args(argv)
    for name in ("rank", "steps", "batch", "lr", "beta", "shift", "n"):
        if not 0 < getattr(args, name) < float("inf"):
            raise BadInput(f"--{name} {getattr(args, name)}: must be above 0")
    if not args.tiny and not (args.model and args.data):
        raise BadInput("--model and --data are needed; --tiny tries the commands without")
    args.reward = args.reward or args.out / "nrg.safetensors"
    return args


def main():
    args = arguments()
    device = pick_device(args.device)
    if args.tiny:
        args.model, args.data = args.out / "tiny", args.out / "tiny" / "pairs"
        wan_model.write_tiny(args.model)
        latents.write_tiny(args.data)
    wan = wan_model.load_transformer(args.model).requires_grad_(False)
    pairs = latents.read_pairs(args.data, wan.config, device)
    torch.manual_seed(args.seed)
    if args.lora:
        wan_model.load_adapters(wan, args.lora)
    elif args.algo in ("dpo", "rwr", "sft"):
        wan_model.add_adapters(wan, args.rank)
    wan.to(device).enable_gradient_checkpointing()
    if args.algo == "sample":
        draw(wan, pairs, args)
        return
    module, path = (WanReward(wan).to(device) if args.algo == "nrg" else wan), args.out / f"{args.algo}.safetensors"

    def save():
        tensors = module.state_dict() if args.algo == "nrg" else wan_model.adapter_tensors(wan)
        wan_model.write_safetensors(tensors, path)

    train(module, pairs, args, save)
    if args.algo == "nrg":
        measure_spread(module, pairs, args.seed)
    save()
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)

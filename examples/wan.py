"""Flow-DPO, Flow-RWR, SFT and Flow-NRG on an open video model: diffusers' Wan text-to-video transformer (section 4).

    pip install diffusers                                  for this folder alone; tested with 0.42.1
    python examples/wan.py --tiny dpo --steps 20           a random model of 0.04 M parameters, made-up pairs: seconds
    python examples/wan.py --model FOLDER --data FOLDER dpo --steps 2000
    torchrun --nproc_per_node 8 examples/wan.py --model FOLDER --data FOLDER --batch 64 --accum 8 dpo

Losses, reward head, guidance and sampler are the toy's own, unmodified: they know v = model(x_t, t, y) and no more.
What differs is in wan_model.py and latents.py: Wan works on latents of its VAE and, for words, on embeddings of its
text encoder, both made beforehand (README.md); its clock runs to 1000; only adapters are trained.
"""

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # the project's modules, from wherever this is started

from data import DIMENSIONS, draw_noise, epoch_index, mean_one, step_rng, take
from examples import latents
from flow import interpolate
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from lora import lora_disabled
from nrg import guide, noisy_pair_step
from reward import decided
from runtime import cli, distributed
from runtime.checkpoint import check_fit, load_checkpoint, save_checkpoint
from runtime.cli import BadInput, finite, positive, positive_int
from runtime.distributed import accumulating, rank, reduce_logs, world_size
from runtime.resume import restore, run_tensors
from sample import NRG_EPS, NRG_INTERVAL, sample
from tasks import ranked

try:
    from examples import wan_model
    from examples.wan_model import WanReward, velocity
except (
    ImportError,
    RuntimeError,
) as error:  # RuntimeError: diffusers with a package it cannot load
    fault = str(error).partition("\n")[0]
    print(f"wan.py: error: diffusers is needed: pip install diffusers ({fault})", file=sys.stderr)
    sys.exit(2)

# ---------------------------------------------------------------------------------------------
# The algorithms


@dataclass
class Task:
    model: torch.nn.Module  # what of it requires gradients is trained
    batch: Callable  # (step, rows) -> dict of tensors: these rows, a slice, of the step's batch
    loss: Callable  # batch -> (loss, logs)


def dpo(wan, pairs, args):
    better, worse = ranked(pairs.total)  # (N', 2: pair, side) each
    policy = velocity(wan)

    def reference(x_t, t, y):
        with lora_disabled(wan):
            return policy(x_t, t, y)

    def batch(step, rows):
        index = epoch_index(len(better), args.batch, step, args.seed)[rows]
        noise = draw_noise(args.batch, pairs.shape, args.shift, step_rng(args.seed, step))
        x0_w, x0_l = pairs.clips(better[index]), pairs.clips(worse[index])
        return {"x0_w": x0_w, "x0_l": x0_l, "y": pairs.texts(better[index]), **take(noise, rows)}

    def loss(batch):
        return flow_dpo_step(policy, reference, **batch, beta=args.beta)

    return Task(wan, batch, loss)


def rwr(wan, pairs, args):
    better, worse = ranked(pairs.total)
    clips, weight = better, torch.ones(len(better))  # SFT: the winners alone
    if args.algo == "rwr":
        clips = torch.cat((better, worse))
        weight = rwr_weights(pairs.total[clips[:, 0], clips[:, 1]])

    def batch(step, rows):
        index = epoch_index(len(clips), args.batch, step, args.seed)[rows]
        noise = draw_noise(args.batch, pairs.shape, args.shift, step_rng(args.seed, step))
        x0, y = pairs.clips(clips[index]), pairs.texts(clips[index])
        return {"x0": x0, "y": y, "weight": weight[index], **take(noise, rows)}

    def loss(batch):
        return flow_rwr_step(velocity(wan), **batch)

    return Task(wan, batch, loss)


def nrg(reward, pairs, args):
    label = (pairs.scores[:, 0] - pairs.scores[:, 1]).sign().long()  # (N, 3)

    def batch(step, rows):
        index = epoch_index(len(label), args.batch, step, args.seed)
        labels = {"label": label[index], "weight": mean_one(decided(label[index]))}
        noise = draw_noise(args.batch, pairs.shape, 1.0, step_rng(args.seed, step))
        a, b = (
            torch.stack((index[rows], torch.full_like(index[rows], side)), 1) for side in (0, 1)
        )
        x0_a, x0_b, y = pairs.clips(a), pairs.clips(b), pairs.texts(a)
        return {"x0_a": x0_a, "x0_b": x0_b, "y": y, **take(labels | noise, rows)}

    def loss(batch):
        return noisy_pair_step(reward, **batch)

    return Task(reward, batch, loss)


ALGORITHMS = {"dpo": dpo, "rwr": rwr, "sft": rwr, "nrg": nrg}

# ---------------------------------------------------------------------------------------------
# Training


def fit(task, args, device, state, save):
    """Takes the steps that `state`, of the run that goes on, leaves of args.steps; at times calls
    save(step, trained, optimizer), trained: {name: parameter}. Prints the first batch's loss before
    and after. Under torchrun every process calls this."""
    trained = {name: value for name, value in task.model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), args.lr, weight_decay=0.0)
    start = restore(state, trained, {}, optimizer) if state else 0
    loss_of = distributed.Loss(task, bf16=False)  # velocity and WanReward choose their precision
    if world_size() > 1:
        loss_of = DistributedDataParallel(loss_of)
    rows = distributed.local_rows(args.batch)

    def micro_batches(step):
        batch = task.batch(step, rows)
        for i in range(args.accum):
            yield {name: value.chunk(args.accum)[i].to(device) for name, value in batch.items()}

    def report(when):
        with torch.no_grad():
            micro_losses = [(loss.item(), logs) for loss, logs in map(task.loss, micro_batches(0))]
        loss, logs, _ = reduce_logs(micro_losses, False)
        accuracy = f", accuracy {logs['accuracy']:.2f}" if "accuracy" in logs else ""
        if rank() == 0:
            print(f"{args.algo}: {when} {loss:.4f}{accuracy}")
        return loss

    if start == 0:
        loss = report("loss of the first batch")
        if args.algo == "dpo" and abs(loss - math.log(2)) > 1e-3 and rank() == 0:
            print("dpo: that is not ln 2 = 0.6931: the policy does not start at its reference")
    for step in cli.progress_bar(args.algo, "step")(range(start, args.steps)):
        micro_losses = []
        for i, micro_batch in enumerate(micro_batches(step)):
            with accumulating(loss_of, last=i == args.accum - 1):
                loss, logs = loss_of(micro_batch)
                (loss / args.accum).backward()
            micro_losses.append((loss.item(), logs))
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item()
        loss, _, _ = reduce_logs(micro_losses, False)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise BadInput(f"loss {loss}, gradient {grad_norm} at step {step}; try a smaller --lr")
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1, trained, optimizer)
    report(f"after {max(start, args.steps)} steps")


def measure_spread(reward, pairs, seed, device, most=64):
    """Sets reward.std, by which scores are divided: guidance takes rewards of unit spread."""
    rng, scores = step_rng(seed, -1), []
    with torch.no_grad():
        for pair in range(min(len(pairs.files), most)):
            both = torch.tensor([[pair, 0], [pair, 1]])
            noise = draw_noise(2, pairs.shape, 1.0, rng)
            x_t = interpolate(pairs.clips(both), **noise).to(device)
            scores.append(reward(x_t, noise["t"].to(device), pairs.texts(both).to(device)))
        reward.std.copy_(torch.cat(scores).std(0).clamp(min=1e-6))


def train(wan, pairs, args, device):
    """Writes OUT/ALGO.safetensors, the result, and OUT/ALGO.pt, which --resume reads."""
    result, checkpoint = args.out / f"{args.algo}.safetensors", args.out / f"{args.algo}.pt"
    table = (args.data / "pairs.csv").read_bytes()
    settings = {"pairs.csv, by its SHA-256,": hashlib.sha256(table).hexdigest()[:12]}
    for name in ("model", "data", "lora", "rank", "batch", "lr", "beta", "shift", "seed"):
        settings[f"--{name}"] = str(getattr(args, name))
    state, initial = None, {}
    if args.resume or (distributed.restarts() and checkpoint.exists()):
        state = load_checkpoint(checkpoint, f"wan {args.algo}")
        initial = state["initial"]
        for name, value in settings.items():
            if state["settings"][name] != value:
                change = f"was {state['settings'][name]} in {checkpoint}, now {value}"
                raise BadInput(f"--resume: {name} {change}; use the same")
    elif args.lora:
        initial = wan_model.read_adapters(wan, args.lora)
    cli.check_writable(args.out, "--out")

    # what a run starts from becomes part of the frozen weights, which are the reference of Flow-DPO
    wan_model.merge_adapters(wan, initial)
    torch.manual_seed(args.seed)
    if args.algo == "nrg":
        model = WanReward(wan).to(device)
    else:
        wan_model.add_adapters(wan, args.rank)  # drawn on the CPU: a seed is one start everywhere
        model = wan
    wan.to(device).enable_gradient_checkpointing()

    def write_result():
        if args.algo == "nrg":
            wan_model.write_safetensors(model.state_dict(), result)
        else:
            wan_model.write_adapters(wan, initial, result)

    def save(step, trained, optimizer):
        state = {"kind": f"wan {args.algo}", "config": {}, "vocabulary": [], "step": step}
        state |= {"settings": settings, "initial": initial}
        state["training"] = run_tensors(trained, {}, optimizer)
        state["model"] = {name: value.detach() for name, value in trained.items()}
        if rank() == 0:
            save_checkpoint(checkpoint, state)
            write_result()

    fit(ALGORITHMS[args.algo](model, pairs, args), args, device, state, save)
    if args.algo == "nrg" and rank() == 0:
        measure_spread(model, pairs, args.seed, device)
        write_result()
    if rank() == 0:
        print(f"wrote {result}")


# ---------------------------------------------------------------------------------------------
# Sampling


def draw(wan, pairs, args, device):
    """Latents of the first pairs' prompts, without and with guidance by a reward, for the VAE to decode."""
    if args.lora:
        wan_model.attach_adapters(wan, wan_model.read_adapters(wan, args.lora))
    wan.to(device).enable_gradient_checkpointing()
    chosen = torch.tensor([[pair % len(pairs.files), 0] for pair in range(args.n)])
    y = pairs.texts(chosen).to(device)
    null = latents.read_array(*pairs.null).expand_as(y).to(device)
    x1 = torch.randn(args.n, *pairs.shape, generator=step_rng(args.seed, 0)).to(device)
    guidances = {"plain": None}
    if args.nrg:
        tensors, _ = wan_model.read_safetensors(args.reward)
        reward = WanReward(wan).to(device).requires_grad_(False)  # reads wan without its adapters
        check_fit(reward, tensors, args.reward)
        reward.load_state_dict(tensors)
        guidances["guided"] = guide(reward, args.nrg, args.nrg_scale, NRG_EPS, NRG_INTERVAL)
    for name, guidance in guidances.items():
        x0 = sample(velocity(wan), x1, y, args.steps, args.cfg, null, guidance, args.shift)
        latents.write_latents(x0, args.out / f"{name}.npy")
        line = f"wrote {args.out / name}.npy"
        if args.nrg:
            with torch.no_grad():
                scores = reward(x0, torch.zeros(args.n, device=device), y).mean(0).tolist()
            line += "; learned reward " + " ".join(
                f"{name} {value:.2f}" for name, value in zip(DIMENSIONS, scores)
            )
        print(line)


# ---------------------------------------------------------------------------------------------
# The command


def arguments(argv=None):
    parser = cli.Parser("Aligns diffusers' Wan by LoRA, trains a reward on it, samples from it.")
    parser.add_argument("algo", choices=(*ALGORITHMS, "sample"), help="what to do")
    parser.add_argument(
        "--tiny", action="store_true", help="a random model, made-up pairs, and defaults for them"
    )
    parser.add_argument(
        "--model", type=Path, help="folder of Wan in diffusers' format, or of its transformer"
    )
    parser.add_argument("--data", type=Path, help="folder of pairs (examples/latents.py)")
    parser.add_argument("--out", type=Path, default=Path("out/wan"), help="folder to write to")
    parser.add_argument(
        "--lora",
        type=Path,
        help="adapters to start from (dpo: its reference too) or to sample with",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, bit for bit"
    )
    parser.add_argument("--rank", type=positive_int, default=64, help="of new adapters")
    parser.add_argument(
        "--steps", type=positive_int, default=50, help="optimiser steps, or Euler steps of sample"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=1, help="pairs a step; clips with rwr and sft"
    )
    parser.add_argument(
        "--accum", type=positive_int, default=1, help="micro-batches, one after the other, a step"
    )
    parser.add_argument(
        "--save-every", type=positive_int, default=100, help="steps between checkpoints"
    )
    parser.add_argument("--lr", type=positive, default=5e-6, help="learning rate; with nrg 1e-3")
    parser.add_argument(
        "--beta", type=positive, default=500.0, help="dpo: larger stays closer to the reference"
    )
    parser.add_argument(
        "--shift", type=positive, default=3.0, help="of t towards noise, but in nrg; 5 at 720 lines"
    )
    parser.add_argument("--n", type=positive_int, default=1, help="sample: clips")
    parser.add_argument(
        "--cfg", type=finite, default=5.0, help="sample: classifier-free guidance; 1 = off"
    )
    parser.add_argument(
        "--nrg", type=cli.triple, help="sample: weights of VQ, MQ and TA, for example 1,1,0.5"
    )
    parser.add_argument("--nrg-scale", type=finite, default=100.0, help="sample: w of Eq. 11")
    parser.add_argument(
        "--reward", type=Path, help="sample: what nrg wrote (default: OUT/nrg.safetensors)"
    )
    parser.add_argument(
        "--seed", type=cli.seed, default=0, help="of adapters, order, noise and times"
    )
    parser.add_argument("--device", default="auto", help="auto (cuda, mps, cpu) or a torch device")
    args = parser.parse_args(argv)
    if args.algo == "nrg" or args.tiny:
        parser.set_defaults(lr=1e-3)
    if args.tiny:
        parser.set_defaults(rank=4, batch=8, n=8, beta=10.0)
    args = parser.parse_args(argv)
    if not args.tiny and not (args.model and args.data):
        raise BadInput("--model and --data are needed; --tiny tries the commands without")
    if args.algo == "nrg" and args.lora:
        raise BadInput("--lora: nrg's reward reads the model without adapters; leave it out")
    args.reward = args.reward or args.out / "nrg.safetensors"
    return args


def main():
    args = arguments()
    device = distributed.start_process(args.device)
    parts = world_size() * args.accum
    if args.batch % parts:
        raise BadInput(
            f"--batch {args.batch}: must be a multiple of {parts}, that is of processes x --accum"
        )
    if args.tiny:
        args.model, args.data = args.out / "tiny", args.out / "tiny" / "pairs"
        with distributed.process_0_first():
            if rank() == 0:
                wan_model.write_tiny(args.model)
                latents.write_tiny(args.data)
    wan = wan_model.load_transformer(args.model).requires_grad_(False)
    pairs = latents.read_pairs(args.data, wan.config)
    if args.algo == "sample":
        draw(wan, pairs, args, device)
    else:
        train(wan, pairs, args, device)
    distributed.stop_process()


if __name__ == "__main__":
    cli.run(main)

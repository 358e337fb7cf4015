"""Training: one loop for every algorithm.

    python train.py --algo dpo          align the shipped base model with the shipped VideoReward; ends with a table
    python train.py --algo rwr          the same by reward-weighted regression, or --algo sft on the winners alone
    python train.py --algo pretrain     the base model from nothing (flow matching, section 4.1)
    python train.py --algo reward       VideoReward from nothing (section 3.2)
    python train.py --algo nrg          the noise-aware reward for guidance, on the base model's first blocks (4.4)
    torchrun --nproc_per_node 8 train.py --algo pretrain --preset large --fsdp       on eight GPUs (distributed.py)

All that is random in step n comes from the seed and n, so a run that was stopped and resumed (checkpoint.py) ends at
the same bits, and one that is spread over processes or micro-batches (parts.py) takes the same steps.
"""

import argparse
import copy
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import (
    averaged,
    facts,
    gathered,
    interrupted_run,
    newest,
    open_log,
    refuse_used,
    restore,
    save_shards,
    save_whole,
    write_log,
)
from common import BadInput, Parser, check_writable, has_bf16, numbers, run, save_checkpoint
from data import step_rng
from distributed import (
    accumulating,
    launched,
    own,
    rank,
    restarted,
    size,
    spread,
    start_process,
    stop_process,
    together,
    whole,
)
from flow import TIME_SHIFT
from flow_dpo import SCHEDULES
from model import PRESETS
from parts import Part
from plan import plan
from tasks import LOSSES, TASKS

# A flag left out takes its algorithm's value here. The paper tunes pretrained models, by Adam: VideoReward at 2e-6 and
# batch 32, the noise-aware reward at 5e-6 and batch 144, both for 2 epochs (Table 11); sft, rwr and dpo at 5e-6 and
# batch 64 for one epoch (Table 10). README, "Settings, and why", has more.
DEFAULTS = {
    "pretrain": {"steps": 6000, "batch": 32, "lr": 2.5e-3, "decay": 0.4, "ema": 0.999},
    "reward": {"steps": 900, "batch": 32, "lr": 1e-3, "decay": 0.2, "ema": 0.0},
    "nrg": {"steps": 3000, "batch": 32, "lr": 3e-3, "decay": 0.2, "ema": 0.0},
    "sft": {"steps": 200, "batch": 16, "lr": 1e-4, "decay": 0.0, "ema": 0.0},
    "rwr": {"steps": 200, "batch": 16, "lr": 1e-4, "decay": 0.0, "ema": 0.0},
    "dpo": {"steps": 200, "batch": 16, "lr": 1e-4, "decay": 0.0, "ema": 0.0},
}
WARMUP = 100  # steps, or a tenth of a shorter run


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(task, args, device, state=None):
    """Trains task.model to args.steps, on from `state` if there is one. Returns lines that say how it ended.

    SIGINT and SIGTERM save and exit with status 130; a loss or gradient that is not finite stops the run before it is
    used. Under torchrun every process calls this with the same arguments, and process 0 returns the lines."""
    model, first = task.model, rank() == 0
    spare = copy.deepcopy(model).cpu() if args.fsdp and first else None  # whole again at the end
    for module in model.modules():
        if hasattr(module, "checkpointed"):
            module.checkpointed = args.grad_checkpoint
    loss_of = spread(task, device, args.fsdp, args.compile, in_bf16(args, device))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type != "mps"
    )
    average = {name: value.detach().clone() for name, value in trained.items()} if args.ema else {}
    start = restore(state, trained, average, optimizer) if state else 0
    kept = f"{newest(args.out)} is the last good state" if state else "nothing was saved yet"

    def save(step, **final):
        nonlocal kept
        write = save_shards if args.fsdp else save_whole
        write(args, task, step, trained, average, optimizer, **final)
        kept = f"{newest(args.out)}, after step {step - 1}, is the last good state"

    every, learned = (sum(map(torch.numel, values)) for values in (model.parameters(), trained.values()))
    if args.export and first:
        check_writable(args.export.parent, "--export")
    log = open_log(args.out, start, 4 * (every + (3 if args.ema else 2) * learned))  # weights, AdamW's two, averages
    stopped = []
    signals = signal.SIGINT, signal.SIGTERM
    handlers = [signal.signal(number, lambda *_: stopped.append(True)) for number in signals]
    bar = tqdm(total=args.steps, initial=start, desc=args.algo, dynamic_ncols=True, disable=not first)
    try:
        with log, bar:
            for step in range(start, args.steps):
                rng = step_rng(args.seed, step)
                part = Part(rng, rank(), size())
                batch = {name: value.to(device) for name, value in task.batch(step, part).items()}
                made = []
                for micro in part.split(args.accum):
                    here = {name: micro.cut(value) for name, value in batch.items()}
                    with accumulating(loss_of, last=micro.index == args.accum - 1):
                        loss, logs = loss_of(here, micro)
                        (loss / args.accum).backward()
                    made.append((loss.item(), logs))
                norm = whole(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)).item()
                loss, logs, stop = together(made, bool(stopped))
                if not math.isfinite(loss) or not math.isfinite(norm):
                    what = f"loss is {loss}, its gradient's norm {norm} at step {step}"
                    raise BadInput(f"{what} (--seed {args.seed}, the batch's {rng.initial_seed()}); {kept}")
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * schedule(step, args.steps, args.decay)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if average:
                    memory = min(args.ema, (step + 1) / (step + 10))  # short at the start
                    new = [own(value.detach()) for value in trained.values()]
                    torch._foreach_lerp_([own(value) for value in average.values()], new, 1 - memory)
                logs["grad_norm"] = norm
                saving = stop or (step + 1) % args.save_every == 0 or step + 1 == args.steps
                write_log(log, json.dumps({"step": step, **logs}) + "\n", sync=saving)
                bar.set_postfix({name: f"{logs[name]:.3f}" for name in task.shown if name in logs}, refresh=False)
                bar.update()
                if saving:
                    save(step + 1)
                if stop:
                    bar.close()
                    if first:
                        print(f"stopped after step {step + 1}; --resume continues from {newest(args.out)}")
                    sys.exit(130)
    except OSError as error:  # of the log, at the latest when it is closed
        raise BadInput(f"cannot write {args.out / 'metrics.jsonl'}: {error.strerror}; {kept}") from None
    finally:
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)

    final = gathered(model, average, spare) if args.fsdp else averaged(model, average)
    if not first:
        return []
    final = task.plain(final.to(device)).eval()
    lines = task.finish(final, args.out)
    last, alone = args.out / "last.pt", {**facts(task, args.steps), "model": task.stored(final)}
    if args.fsdp:
        save_checkpoint(last, alone)
    else:
        save(args.steps, final=final)  # with what finish measured, the reward's z-score constants
    if args.export:
        save_checkpoint(args.export, alone | {"model": {name: value.half() for name, value in alone["model"].items()}})
        lines.append(f"wrote {args.export}")
    return [*lines, f"wrote {args.out / 'metrics.jsonl'}", f"wrote {last}"]


def schedule(step, steps, decay):
    """Factor of the learning rate: linear warm-up, constant, then linear to 0 over the last `decay` of the run."""
    warmup = min(WARMUP, max(1, steps // 10))
    rise = min(1.0, (step + 1) / warmup)
    return rise * min(1.0, (steps - step) / (decay * steps)) if decay else rise


def in_bf16(args, device):
    return args.precision == "bfloat16" or (args.precision == "auto" and has_bf16(device))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def arguments(argv=None):
    """The flags of a command line, the algorithm's defaults filled in."""
    parser = Parser(
        "Trains one algorithm; writes last.pt, metrics.jsonl and pictures to --out. "
        "Where no checkpoint is named, the shipped weights/ are used."
    )

    group = parser.add_argument_group("what to train")
    group.add_argument("--algo", choices=TASKS, default="dpo", help="algorithm")
    group.add_argument("--preset", choices=PRESETS, default="nano", help="size of a model trained from nothing")
    group.add_argument("--attention", help="full, or tile:T,H,W for sliding tiles (default: full, or as --init has it)")
    group.add_argument("--init", type=Path, help="base model to align; dpo's reference, nrg's trunk (weights/base.pt)")
    group.add_argument("--reward", type=Path, help="VideoReward that scores the pairs (weights/reward.pt)")

    group = parser.add_argument_group("how long and how fast")
    helps = {
        "steps": (int, "optimiser steps"),
        "batch": (int, "clips (pretrain) or pairs a step; sft and rwr take two clips for a pair"),
        "lr": (float, "peak learning rate of AdamW"),
        "decay": (float, "last share of the run in which the rate falls to 0; 0 = constant"),
        "ema": (float, "memory of the averaged weights; 0 = none"),
    }
    for name, (kind, text) in helps.items():
        values = ", ".join(f"{algo} {defaults[name]}" for algo, defaults in DEFAULTS.items())
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {values})")
    group.add_argument("--seed", type=int, default=0, help="of weights, data, noise and times")
    group.add_argument("--device", default="auto", help="auto (cuda, mps, cpu) or a torch device")
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of matrix products; auto = bfloat16 where the device has instructions for it. Weights are float32",
    )
    group.add_argument("--compile", action="store_true", help="each block by torch.compile: for a GPU, not for a CPU")
    group.add_argument("--grad-checkpoint", action="store_true", help="keep a block's input alone for backward")
    group.add_argument("--accum", type=int, default=1, help="micro-batches that a process cuts its batch into")
    group.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model, not only the batch")

    group.add_argument("--plan", type=int, help="print what this training takes on so many GPUs, and do nothing")
    group.add_argument("--flops", type=float, default=4e14, help="of --plan: FLOP/s that a GPU sustains")

    group = parser.add_argument_group("flow matching")
    group.add_argument(
        "--time-shift", type=float, help="of t towards noise (default: 4, nrg 1); 1 = none, 0 = clean clips (nrg alone)"
    )
    group.add_argument("--label-dropout", type=float, default=0.1, help="share of prompts dropped, for CFG")

    group = parser.add_argument_group("preferences")
    group.add_argument(
        "--pairs", type=int, help="toy pairs in the data set (default: one epoch; reward, nrg two, as in Table 11)"
    )
    group.add_argument("--loss", choices=LOSSES, default="btt", help="reward: with ties, without, or on ratings (3.2)")
    group.add_argument(
        "--tokens", choices=("separate", "shared"), default="separate", help="reward: one a score, or one"
    )
    group.add_argument(
        "--caption", type=float, help="reward: weight of the loss on the prompt's words (default: 1; with --data 0)"
    )
    group.add_argument(
        "--beta", type=float, default=100.0, help="dpo: on mean errors; larger stays closer to the reference"
    )
    group.add_argument("--schedule", choices=SCHEDULES, default="constant", help="dpo: beta over t (section 4.2)")
    group.add_argument(
        "--temperature", type=float, default=1.0, help="rwr: of exp(reward / temperature); lower = sharper"
    )
    group.add_argument("--align", default="1,1,1", help="alignment: weights of VQ, MQ and TA in the reward (5.2)")
    group.add_argument("--freeze", type=int, default=2, help="alignment: first blocks left as in the base; 0 = none")
    group.add_argument("--lora-rank", type=int, default=0, help="alignment: adapters of this rank; 0 = the weights")

    group.add_argument("--read", type=int, default=2, help="nrg: first blocks of the base model that the reward reads")
    group.add_argument("--pair-noise", choices=("shared", "own"), default="shared", help="nrg: of the clips of a pair")
    group.add_argument(
        "--contrast", type=float, default=1.0, help="nrg: weight of the loss on a clip's own prompt against another"
    )
    group.add_argument(
        "--trunk", choices=("frozen", "trained"), default="frozen", help="nrg: whether these blocks stay the base's"
    )

    group = parser.add_argument_group("real data")
    group.add_argument(
        "--data", type=Path, help="CSV of pairs of videos or latents, in VideoAlign's format (default: the toy world)"
    )
    group.add_argument(
        "--val", type=Path, help="reward, nrg: CSV to validate on (default: a tenth of the prompts, held out)"
    )
    group.add_argument("--cache", type=Path, default=Path("out/clips"), help="folder that keeps decoded clips")
    group.add_argument("--skip-bad", action="store_true", help="go on without rows that have a fault, and count them")

    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, help="folder (default: out/<algo>)")
    group.add_argument("--resume", action="store_true", help="continue the run in --out")
    group.add_argument("--export", type=Path, help="also write the final weights here, alone and as float16")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--eval-prompts", type=int, default=192, help="prompts of the closing table")
    group.add_argument("--eval-pairs", type=int, default=1000, help="reward, nrg: validation pairs")
    group.add_argument("--eval-seed", type=int, default=1234, help="noise of the closing table")

    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.algo].items():
        if not hasattr(args, name):
            setattr(args, name, value)
    for name in ("steps", "batch", "accum", "save_every", "eval_prompts", "eval_pairs", "plan"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.time_shift is None:
        args.time_shift = 1.0 if args.algo == "nrg" else TIME_SHIFT
    clean = args.algo == "nrg" and args.time_shift == 0
    for name in ("lr", "beta", "temperature", "flops", *(() if clean else ("time_shift",))):
        if not 0 < getattr(args, name) < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a positive number")
    for name in ("decay", "ema", "label_dropout"):
        if not 0 <= getattr(args, name) <= 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie between 0 and 1")
    if args.attention and args.algo == "reward":
        raise BadInput("--attention: of the video model; VideoReward sees all tokens at once")
    args.align = numbers("--align", args.align, "1,1,1")
    if not any(args.align):
        raise BadInput("--align 0,0,0: at least one weight must not be 0")
    if args.caption is None:
        args.caption = 0.0 if args.data else 1.0  # measured on the toy alone, whose vocabulary is 17 words
    for name in ("caption", "contrast"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise BadInput(f"--{name} {getattr(args, name)}: must be 0 or a positive number")
    args.out = args.out or Path("out") / args.algo
    args.pairs = args.pairs or args.steps * args.batch // (2 if args.algo in ("reward", "nrg") else 1) or 1
    return args


def main():
    args = arguments()
    if args.plan:
        print("\n".join(plan(args)))
        return
    device = start_process(args.device)
    parts = size() * args.accum
    if args.batch % parts:
        raise BadInput(
            f"--batch {args.batch}: must be a multiple of {parts}, {size()} processes x --accum {args.accum}"
        )
    if args.fsdp and not launched():
        raise BadInput("--fsdp: shards over the processes of torchrun; start with torchrun --nproc_per_node N train.py")
    begun = time.perf_counter()
    args.resume = args.resume or (restarted() and newest(args.out) is not None)
    refuse_used(args)
    state = interrupted_run(args) if args.resume else None
    task = TASKS[args.algo](args, device)
    count = sum(p.numel() for p in task.model.parameters())
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    kind = "bfloat16" if in_bf16(args, device) else "float32"
    where = f"{device}" if size() == 1 else f"{size()} processes on {device.type}"
    if rank() == 0:
        print(
            f"{args.algo}: {count / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained, {kind} on {where}, ", end=""
        )
        print(f"{args.steps} steps of {args.batch}, lr {args.lr:g}, seed {args.seed}")
    lines = train(task, args, device, state)
    if rank() == 0:
        print("\n".join(["", *lines]) + f" in {(time.perf_counter() - begun) / 60:.1f} minutes")
    stop_process()


if __name__ == "__main__":
    run(main)

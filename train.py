"""Training: one loop for every algorithm.

    python train.py --algo dpo          align the shipped base model with the shipped VideoReward; ends with a table
    python train.py --algo pretrain     the base model from nothing (flow matching, section 4.1)
    python train.py --algo reward       VideoReward from nothing (section 3.2)

An algorithm is a Task: a model, a batch for each step, and a function of the batch that returns (loss, logs). All that
is random in step n comes from the seed and n, so a run that was stopped and resumed ends at the same bits.
"""

import argparse
import copy
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import world
from common import WEIGHTS, BadInput, load_checkpoint, pick_device, run, save_checkpoint
from compare import learned_scores, prompt_set, sample_prompts, score_table
from data import Vocabulary, annotated_pairs, clip_batch, draw_pairs, drop_prompts, step_rng
from flow import TIME_SHIFT, draw_noise, draw_time, flow_error
from flow_dpo import SCHEDULES, flow_dpo_step
from model import PRESETS, VideoTransformer, freeze_trunk, load_velocity
from reward import DIMENSIONS, VideoReward, accuracy_with_ties, accuracy_without_ties, btt_loss, load_reward
from sample import CFG, write_gif, write_sheet

# Every number is measured (README, "settings") or the paper's; a flag left out takes its algorithm's value here.
DEFAULTS = {
    "pretrain": {"steps": 6000, "batch": 32, "lr": 2.5e-3, "decay": 0.4, "ema": 0.999},
    "reward": {"steps": 2000, "batch": 32, "lr": 1e-3, "decay": 0.4, "ema": 0.0},
    "dpo": {"steps": 200, "batch": 16, "lr": 1e-4, "decay": 0.0, "ema": 0.0},
}
WARMUP = 100  # steps, or a tenth of a shorter run


@dataclass
class Task:
    """What the loop needs to know of an algorithm."""

    kind: str  # of its checkpoint: "velocity" or "reward"
    model: torch.nn.Module  # the one that is trained
    vocabulary: Vocabulary
    batch: Callable  # (step, rng) -> dict of tensors on the CPU
    loss: Callable  # (batch, rng) -> (loss, logs)
    shown: tuple  # names of the logs in the progress bar
    finish: Callable  # (model, out) -> lines to print; may write files and set buffers of the model


# ---------------------------------------------------------------------------------------------------------------------
# The algorithms


def pretrain_task(args, device):
    vocabulary = Vocabulary()
    torch.manual_seed(args.seed)
    model = VideoTransformer(replace(PRESETS[args.preset], vocab=len(vocabulary.words))).to(device)

    def batch(step, rng):
        made = clip_batch(model.config, vocabulary, args.batch, rng)
        return {**made, "y": drop_prompts(made["y"], args.label_dropout, rng)}

    def loss(batch, rng):
        x0 = batch["video"]
        t = draw_time(len(x0), rng, args.time_shift, normal=True).to(device)
        error = flow_error(model, x0, draw_noise(x0, rng), t, batch["y"]).mean()
        return error, {"loss": error.item()}

    def finish(model, out):
        prompts = prompt_set(args.eval_prompts, "train", "validation", "hard")
        lines = []
        for cfg in (1.0, CFG):
            bar = progress_bar(f"sampling at CFG {cfg:g}", "batch")
            videos = sample_prompts(model, vocabulary.words, prompts, args.eval_seed, device, progress=bar, cfg=cfg)
            score = world.oracle(videos, prompts).mean(0).tolist()
            right = (world.attributes_right(videos, prompts) > 0.5).float().mean(0).tolist()
            lines.append(f"CFG {cfg:g}: true score " + " ".join(f"{n} {v:.2f}" for n, v in zip(DIMENSIONS, score)))
            lines[-1] += "; right " + " ".join(f"{n} {v:.2f}" for n, v in zip(("colour", "shape", "direction"), right))
        write_gif(out / "samples.gif", list(videos[:32].split(8)))
        write_sheet(out / "samples.png", videos[:16])
        return [*lines, f"wrote {out / 'samples.gif'} and .png (CFG {CFG:g})"]

    return Task("velocity", model, vocabulary, batch, loss, ("loss",), finish)


def reward_task(args, device):
    vocabulary = Vocabulary()
    torch.manual_seed(args.seed)
    config = replace(PRESETS[args.preset], vocab=len(vocabulary.words), dim=96, depth=4)
    model = VideoReward(config).to(device)
    bar = progress_bar("annotators look at the pairs", "x64 pairs")
    pairs = annotated_pairs(args.pairs, ["train"], args.seed, config, bar)

    def batch(step, rng):
        return pairs.batch(epoch_index(len(pairs), args.batch, step, args.seed), config, vocabulary)

    def loss(batch, rng):
        scores = model(torch.cat((batch["video_a"], batch["video_b"])), batch["y"].repeat(2, 1))  # (2B, 3)
        a, b = scores.chunk(2)
        total = btt_loss(a, b, batch["label"])
        right = [accuracy_without_ties((a - b)[:, i], batch["label"][:, i]) for i in range(3)]
        return total, {"loss": total.item(), **dict(zip(DIMENSIONS, right))}

    def finish(model, out):
        held = annotated_pairs(args.eval_pairs, ["validation"], args.seed + 1, config)
        scores = []
        with torch.no_grad():
            for index in torch.arange(len(held)).split(64):
                made = held.batch(index, config, vocabulary)
                y = made["y"].to(device)
                scores.append([model(made[name].to(device), y).cpu() for name in ("video_a", "video_b")])
        a, b = (torch.cat(side) for side in zip(*scores))
        both = torch.cat((a, b))
        model.mean.copy_(both.mean(0))
        model.std.copy_(both.std(0))
        lines = [
            f"{len(held)} validation pairs, prompts never seen in training (accuracy without ties, with ties; ties):"
        ]
        for i, name in enumerate(DIMENSIONS):
            delta, label = a[:, i] - b[:, i], held.label[:, i]
            with_ties, _ = accuracy_with_ties(delta, label)
            ties = (label == 0).float().mean().item()
            lines.append(f"  {name}  {accuracy_without_ties(delta, label):.3f}  {with_ties:.3f}  {ties:.3f}")
        return lines

    return Task("reward", model, vocabulary, batch, loss, ("loss", *DIMENSIONS), finish)


def dpo_task(args, device):
    base, words = load_velocity(args.init or WEIGHTS / "base.pt")
    reward, reward_words = load_reward(args.reward or WEIGHTS / "reward.pt")
    base, reward = base.to(device).requires_grad_(False), reward.to(device).requires_grad_(False)
    policy = freeze_trunk(copy.deepcopy(base).requires_grad_(True), args.freeze)
    vocabulary = Vocabulary(words)
    winner, loser = ranked_pairs(args, base.config, reward, reward_words, device)

    def batch(step, rng):
        index = epoch_index(len(winner), args.batch, step, args.seed)
        win, lose = winner[index], loser[index]
        y = vocabulary.encode_attributes(win.prompt, base.config.max_text)
        y = drop_prompts(y, args.label_dropout, rng)
        return {"winner": world.render(win, base.config.size), "loser": world.render(lose, base.config.size), "y": y}

    def loss(batch, rng):
        pair = batch["winner"], batch["loser"], batch["y"]
        return flow_dpo_step(policy, base, *pair, args.beta, rng, args.schedule, args.time_shift)

    def finish(policy, out):
        prompts = prompt_set(args.eval_prompts, "train", "validation", "hard")
        lines = []
        for cfg in (CFG, 1.0):  # the pictures are made at CFG 1, where only the alignment differs
            bar = progress_bar(f"sampling at CFG {cfg:g}", "batch")
            videos = [
                sample_prompts(m, words, prompts, args.eval_seed, device, progress=bar, cfg=cfg) for m in (base, policy)
            ]
            scores = [world.oracle(video, prompts) for video in videos]
            learned = [learned_scores(reward, reward_words, video, prompts, device) for video in videos]
            table = score_table(("base", "aligned"), scores, learned)
            lines += [f"{args.eval_prompts} prompts, the same noise for both, CFG {cfg:g}", *table, ""]
        first = torch.arange(0, args.eval_prompts, max(1, args.eval_prompts // 8))[:8]
        write_gif(out / "base_above_aligned.gif", [video[first] for video in videos])
        rows = torch.stack([video[first] for video in videos], 1).flatten(0, 1)  # base, aligned, base, aligned ...
        write_sheet(out / "base_above_aligned.png", rows)
        return [*lines, f"wrote {out / 'base_above_aligned.gif'} and .png (CFG 1)"]

    return Task("velocity", policy, vocabulary, batch, loss, ("loss", "accuracy"), finish)


TASKS = {"pretrain": pretrain_task, "reward": reward_task, "dpo": dpo_task}


def ranked_pairs(args, config, reward, words, device):
    """Toy pairs relabelled by VideoReward (section 5.1): (winners, losers) as Clips, by the mean of the three z-scores.

    Offline and once, as in the paper: clips of the twelve generators, none of the policy's own. Equal rewards make no
    pair."""
    a, b = draw_pairs(args.pairs, ["train"], args.seed, config.frames)
    totals = []
    for part in progress_bar("VideoReward ranks the pairs", "x64 pairs")(torch.arange(args.pairs).split(64)):
        sides = [
            learned_scores(reward, words, world.render(side[part], config.size), side.prompt[part], device)
            for side in (a, b)
        ]
        totals.append(torch.stack(sides).mean(-1))  # (2, 64): r = (r_VQ + r_MQ + r_TA) / 3
    total = torch.cat(totals, 1)
    better = total[0] > total[1]
    keep = total[0] != total[1]
    return world.choose(better, a, b)[keep], world.choose(better, b, a)[keep]


def epoch_index(count, batch, step, seed):
    """Indices (batch,) of step `step` in epochs that are each a new permutation of `count` items."""
    position = torch.arange(step * batch, (step + 1) * batch)
    index = torch.empty_like(position)
    for epoch in (position // count).unique().tolist():
        here = position // count == epoch
        index[here] = torch.randperm(count, generator=step_rng(seed, -1 - epoch))[position[here] % count]
    return index


def progress_bar(name, unit):
    """A tqdm for a list, for functions that take a progress argument."""
    return lambda items: tqdm(items, desc=name, unit=unit, leave=False, file=sys.stdout, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(task, args, device):
    """Trains task.model to args.steps, from args.out/last.pt with --resume. Returns the model to use: the average if
    there is one."""
    model = task.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type != "mps")
    average = copy.deepcopy(model).requires_grad_(False).eval() if args.ema else None
    settings = {name: str(value) for name, value in vars(args).items() if name not in UNSETTLED}
    last, metrics = args.out / "last.pt", args.out / "metrics.jsonl"
    start = 0
    if args.resume:
        start = restore(last, model, average, optimizer, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    kept = metrics.read_text().splitlines()[:start] if start and metrics.exists() else []
    metrics.write_text("".join(line + "\n" for line in kept))

    def save(step):
        state = {"kind": task.kind, "config": asdict(model.config), "vocabulary": task.vocabulary.words, "step": step}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "settings": settings}
        save_checkpoint(last, state | ({"ema": average.state_dict()} if average else {}))

    stopped = []
    handlers = {
        number: signal.signal(number, lambda *_: stopped.append(True)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    bar = tqdm(
        range(start, args.steps), initial=start, total=args.steps, desc=args.algo, file=sys.stdout, dynamic_ncols=True
    )
    with open(metrics, "a") as log:
        for step in bar:
            rng = step_rng(args.seed, step)
            batch = {name: value.to(device) for name, value in task.batch(step, rng).items()}
            loss, logs = task.loss(batch, rng)
            if not torch.isfinite(loss):
                raise BadInput(
                    f"loss is {loss.item()} at step {step} (seed {args.seed}); the last good state is {last}"
                )
            loss.backward()
            logs["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, args.steps, args.decay)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average is not None:
                decay = min(args.ema, (step + 1) / (step + 10))  # short memory at the start
                new = [value.detach() for value in model.state_dict().values()]
                torch._foreach_lerp_(list(average.state_dict().values()), new, 1 - decay)
            log.write(json.dumps({"step": step, **logs}) + "\n")
            bar.set_postfix({name: f"{logs[name]:.3f}" for name in task.shown})
            if stopped or (step + 1) % args.save_every == 0:
                log.flush()
                save(step + 1)
            if stopped:
                bar.close()
                print(f"stopped after step {step + 1}; `--resume` continues from {last}")
                sys.exit(130)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    final = (average if average is not None else model).eval()
    lines = task.finish(final, args.out)
    save(args.steps)
    return [*lines, f"wrote {metrics}", f"wrote {last}"]


def schedule(step, steps, decay):
    """Factor of the learning rate: linear warm-up, constant, then linear to 0 over the last `decay` of the run."""
    warmup = min(WARMUP, max(1, steps // 10))
    rise = min(1.0, (step + 1) / warmup)
    return rise * min(1.0, (steps - step) / (decay * steps)) if decay else rise


UNSETTLED = {"resume", "out", "save_every", "device", "eval_prompts", "eval_pairs", "eval_seed"}


def restore(path, model, average, optimizer, settings):
    """Loads a run's state; returns the step it had reached. BadInput if the run had other settings."""
    state = load_checkpoint(path)
    if "optimizer" not in state:
        raise BadInput(f"{path}: weights without the optimiser's state; it can be used with --init, not with --resume")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            was = state["settings"].get(name)
            raise BadInput(f"--resume: --{name.replace('_', '-')} was {was} in {path}, now {value}; use the same")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.load_state_dict(state["ema"])
    return state["step"]


def arguments():
    parser = argparse.ArgumentParser(
        description="Trains one algorithm and writes last.pt, metrics.jsonl and pictures to --out.",
        epilog="Without --init and --reward the shipped weights/ are used.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def by_algorithm(name):
        return argparse.SUPPRESS, ", ".join(f"{algo} {values[name]}" for algo, values in DEFAULTS.items())

    group = parser.add_argument_group("what to train")
    group.add_argument("--algo", choices=TASKS, default="dpo", help="algorithm")
    group.add_argument("--preset", choices=PRESETS, default="nano", help="size of a model trained from nothing")
    group.add_argument("--init", type=Path, help="dpo: base model to start from, also the reference (weights/base.pt)")
    group.add_argument("--reward", type=Path, help="dpo: VideoReward that ranks the pairs (weights/reward.pt)")

    group = parser.add_argument_group("how long and how fast")
    helps = {
        "steps": (int, "optimiser steps"),
        "batch": (int, "clips (pretrain) or pairs (reward, dpo) a step"),
        "lr": (float, "peak learning rate of AdamW"),
        "decay": (float, "last share of the run in which the rate falls to 0; 0 = constant"),
        "ema": (float, "memory of the averaged weights; 0 = none"),
    }
    for name, (kind, text) in helps.items():
        default, values = by_algorithm(name)
        group.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {values})")
    group.add_argument("--seed", type=int, default=0, help="of weights, data, noise and times")
    group.add_argument("--device", default="auto", help="auto (cuda, mps, cpu) or a torch device")

    group = parser.add_argument_group("flow matching")
    group.add_argument(
        "--time-shift", type=float, default=TIME_SHIFT, help="shift of t towards noise; 1 = none (section 4.1)"
    )
    group.add_argument("--label-dropout", type=float, default=0.1, help="share of prompts dropped, for CFG")

    group = parser.add_argument_group("preferences")
    group.add_argument(
        "--pairs", type=int, help="pairs in the data set (default: reward 24000, dpo steps x batch, one epoch)"
    )
    group.add_argument(
        "--beta", type=float, default=100.0, help="dpo: on mean errors; larger stays closer to the reference"
    )
    group.add_argument("--schedule", choices=SCHEDULES, default="constant", help="dpo: beta over t (section 4.2)")
    group.add_argument("--freeze", type=int, default=0, help="dpo: first blocks that stay those of the base; 0 = none")

    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, help="folder (default: out/<algo>)")
    group.add_argument("--resume", action="store_true", help="continue the run in --out")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--eval-prompts", type=int, default=192, help="prompts of the closing table")
    group.add_argument("--eval-pairs", type=int, default=1000, help="reward: validation pairs")
    group.add_argument("--eval-seed", type=int, default=1234, help="noise of the closing table")

    parser.error = lambda message: (_ for _ in ()).throw(BadInput(message))
    args = parser.parse_args()
    for name, value in DEFAULTS[args.algo].items():
        if not hasattr(args, name):
            setattr(args, name, value)
    for name in ("steps", "batch", "save_every", "eval_prompts", "eval_pairs"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("lr", "beta", "time_shift"):
        if not 0 < getattr(args, name) < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a positive number")
    for name in ("decay", "ema", "label_dropout"):
        if not 0 <= getattr(args, name) <= 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie between 0 and 1")
    args.out = args.out or Path("out") / args.algo
    args.pairs = args.pairs or (24000 if args.algo == "reward" else args.steps * args.batch)
    return args


def main():
    args = arguments()
    device = pick_device(args.device)
    begun = time.perf_counter()
    task = TASKS[args.algo](args, device)
    count = sum(p.numel() for p in task.model.parameters())
    trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    print(f"{args.algo}: {count / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained, float32 on {device}, ", end="")
    print(f"{args.steps} steps of {args.batch}, lr {args.lr:g}, seed {args.seed}")
    lines = train(task, args, device)
    print("\n".join(["", *lines, f"{(time.perf_counter() - begun) / 60:.1f} minutes"]))


if __name__ == "__main__":
    run(main)

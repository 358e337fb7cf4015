"""What each algorithm trains: a model, a batch for each step, a loss, and the table at the end.

`train.py` runs any of these tasks in one loop. A task's batch and loss depend on the step's random generator alone.

    pretrain   the video model by flow matching on clips of all twelve generators            section 4.1
    reward     VideoReward on pairs that the annotators compared, BTT                        section 3
    sft        the video model on the winners of pairs that VideoReward ranked               section 5.1
    rwr        the video model on both clips of these pairs, weighted by their reward        section 4.3
    dpo        the video model on these pairs, against its frozen start                      section 4.2
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import world
from common import WEIGHTS
from compare import learned_scores, prompt_set, sample_prompts, score_table
from data import Vocabulary, annotated_pairs, clip_batch, draw_pairs, drop_prompts, step_rng
from flow import draw_noise, draw_time, flow_error
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from model import PRESETS, VideoTransformer, add_lora, freeze_trunk, load_velocity, merge_lora
from reward import (
    DIMENSIONS,
    VideoReward,
    accuracy_with_ties,
    accuracy_without_ties,
    btt_loss,
    caption_loss,
    load_reward,
)
from sample import CFG, write_gif, write_sheet


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
    adapted: bool = False  # whether LoRA is in the model; checkpoints then hold the merged weights and the adapters

    def plain(self, model):
        """The model to save and sample from."""
        return merge_lora(model) if self.adapted else model


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
    preset = PRESETS[args.preset]  # three quarters of its width and two thirds of its depth
    config = replace(preset, vocab=len(vocabulary.words), dim=preset.dim * 3 // 4, depth=preset.depth * 2 // 3)
    model = VideoReward(config).to(device)
    bar = progress_bar("annotators look at the pairs", "x64 pairs")
    pairs = annotated_pairs(args.pairs, ["train"], args.seed, config, bar)

    def batch(step, rng):
        return pairs.batch(epoch_index(len(pairs), args.batch, step, args.seed), config, vocabulary)

    def loss(batch, rng):
        y = batch["y"].repeat(2, 1)
        scores, words = model.scores_and_words(torch.cat((batch["video_a"], batch["video_b"])), y)  # (2B, 3)
        a, b = scores.chunk(2)
        btt, caption = btt_loss(a, b, batch["label"]), caption_loss(words, y)
        total = btt + args.caption * caption
        right = {name: accuracy_without_ties((a - b)[:, i], batch["label"][:, i]) for i, name in enumerate(DIMENSIONS)}
        logs = {"loss": btt.item(), "caption": caption.item()}
        return total, logs | {name: value for name, value in right.items() if value == value}

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
    base, policy, vocabulary, pairs, finish = alignment(args, device)
    winner, loser = ranked(*pairs)
    config = base.config

    def batch(step, rng):
        index = epoch_index(len(winner), args.batch, step, args.seed)
        win, lose = winner[index], loser[index]
        y = drop_prompts(vocabulary.encode_attributes(win.prompt, config.max_text), args.label_dropout, rng)
        return {"winner": world.render(win, config.size), "loser": world.render(lose, config.size), "y": y}

    def loss(batch, rng):
        pair = batch["winner"], batch["loser"], batch["y"]
        return flow_dpo_step(policy, base, *pair, args.beta, rng, args.schedule, args.time_shift)

    return Task("velocity", policy, vocabulary, batch, loss, ("loss", "accuracy"), finish, args.lora_rank > 0)


def rwr_task(args, device):
    _, policy, vocabulary, (a, b, total), finish = alignment(args, device)
    clips = world.join(a, b)
    return weighted_task(args, policy, vocabulary, clips, rwr_weights(total.flatten(), args.temperature), finish)


def sft_task(args, device):
    _, policy, vocabulary, pairs, finish = alignment(args, device)
    winner, _ = ranked(*pairs)
    return weighted_task(args, policy, vocabulary, winner, torch.ones(len(winner)), finish)


def weighted_task(args, policy, vocabulary, clips, weight, finish):
    """The flow-matching loss on clips with weights (N,): two clips for every pair of a DPO step."""
    config = policy.config

    def batch(step, rng):
        index = epoch_index(len(clips), 2 * args.batch, step, args.seed)
        y = drop_prompts(vocabulary.encode_attributes(clips.prompt[index], config.max_text), args.label_dropout, rng)
        return {"video": world.render(clips[index], config.size), "y": y, "weight": weight[index]}

    def loss(batch, rng):
        return flow_rwr_step(policy, batch["video"], batch["y"], batch["weight"], rng, args.time_shift)

    return Task("velocity", policy, vocabulary, batch, loss, ("loss", "effective_samples"), finish, args.lora_rank > 0)


TASKS = {"pretrain": pretrain_task, "reward": reward_task, "sft": sft_task, "rwr": rwr_task, "dpo": dpo_task}


# ---------------------------------------------------------------------------------------------------------------------
# What the alignment algorithms share


def alignment(args, device):
    """The frozen base, the policy that starts from it, its vocabulary, pairs scored by VideoReward, and the comparison
    of the two that ends a run."""
    base, words = load_velocity(args.init or WEIGHTS / "base.pt")
    reward, reward_words = load_reward(args.reward or WEIGHTS / "reward.pt")
    base, reward = base.to(device).requires_grad_(False), reward.to(device).requires_grad_(False)
    policy = copy.deepcopy(base).requires_grad_(True)
    torch.manual_seed(args.seed)
    policy = add_lora(policy, args.lora_rank, skip=args.freeze) if args.lora_rank else freeze_trunk(policy, args.freeze)
    policy = policy.to(device)  # adapters are drawn on the CPU

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
            table = score_table(("base", args.algo), scores, learned)
            lines += [f"{args.eval_prompts} prompts, the same noise for both, CFG {cfg:g}", *table, ""]
        shown = torch.arange(8) * (args.eval_prompts // 8 + 1) % args.eval_prompts  # eight spread over the set
        name = f"base_above_{args.algo}"
        write_gif(out / f"{name}.gif", [video[shown] for video in videos])
        rows = torch.stack([video[shown] for video in videos], 1).flatten(0, 1)  # base, aligned, base, aligned ...
        write_sheet(out / f"{name}.png", rows)
        texts = "; ".join(world.prompt_text(prompt) for prompt in prompts[shown])
        return [*lines, f"wrote {out / name}.gif and .png (CFG 1): {texts}"]

    pairs = scored_pairs(args, base.config, reward, reward_words, device)
    return base, policy, Vocabulary(words), pairs, finish


def scored_pairs(args, config, reward, words, device):
    """Toy pairs relabelled by VideoReward (section 5.1): clips a and b, and the mean of the three z-scores (2, N).

    Offline and once, as in the paper: clips of the twelve generators, none of the policy's own."""
    a, b = draw_pairs(args.pairs, ["train"], args.seed, config.frames)
    totals = []
    for part in progress_bar("VideoReward scores the pairs", "x64 pairs")(torch.arange(args.pairs).split(64)):
        videos = [world.render(side[part], config.size) for side in (a, b)]
        scores = [learned_scores(reward, words, video, a.prompt[part], device) for video in videos]
        totals.append(torch.stack(scores).mean(-1))  # (2, 64): r = (r_VQ + r_MQ + r_TA) / 3
    return a, b, torch.cat(totals, 1)


def ranked(a, b, total):
    """(winners, losers) by total (2, N); equal rewards make no pair."""
    better, keep = total[0] > total[1], total[0] != total[1]
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
    return lambda items: tqdm(items, desc=name, unit=unit, leave=False, dynamic_ncols=True)

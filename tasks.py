"""What each algorithm trains: a model, a batch for each step, a loss, and the table at the end.

`train.py` runs any of these tasks in one loop. A task's batch and loss depend on the step's random generator alone.

    pretrain   the video model by flow matching on clips of all twelve generators            section 4.1
    reward     VideoReward on pairs that annotators compared, toy or on disk                 section 3
    sft        the video model on the winners of pairs that VideoReward ranked               section 5.1
    rwr        the video model on both clips of these pairs, weighted by their reward        section 4.3
    nrg        a small head on the base model's first blocks, on noised pairs, by BT         section 4.4
    dpo        the video model on these pairs, against its frozen start                      section 4.2
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch

import world
from common import WEIGHTS, BadInput, progress_bar
from compare import learned_scores, prompt_set, sample_prompts, score_table
from data import (
    Vocabulary,
    annotated_pairs,
    clip_batch,
    disk_pairs,
    drop_prompts,
    read_pairs,
    split_words,
    step_rng,
    toy_pairs,
    vocabulary_of,
)
from flow import draw_noise, draw_time, flow_error, interpolate
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from model import PRESETS, VideoTransformer, add_lora, freeze_trunk, load_velocity, merge_lora, share_trunk
from nrg import noisy_reward_on, noisy_reward_step, stored
from reward import (
    DIMENSIONS,
    INVALID,
    RewardConfig,
    VideoReward,
    accuracies_without_ties,
    accuracy_with_ties,
    accuracy_without_ties,
    bt_loss,
    btt_loss,
    caption_loss,
    load_reward,
    regression_loss,
)
from sample import CFG, write_gif, write_sheet

MOST_WORDS = 128  # of a real prompt; the paper's are about 100 words long


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
    stored: Callable = torch.nn.Module.state_dict  # model -> tensors to save

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
    vocabulary, config, pairs, held, held_name = disk_data(args) if args.data else toy_data(args)
    torch.manual_seed(args.seed)
    model = VideoReward(config).to(device)

    def batch(step, rng):
        return pairs.batch(epoch_index(len(pairs), args.batch, step, args.seed))

    def loss(batch, rng):
        y = batch["y"].repeat(2, 1)
        scores, words = model.scores_and_words(torch.cat((batch["video_a"], batch["video_b"])), y)  # (2B, 3)
        a, b = scores.chunk(2)
        label = batch["label"]
        preference = LOSSES[args.loss](a, b, batch)
        caption = caption_loss(words, y)
        right = accuracies_without_ties(a - b, label)
        logs = {"loss": preference.item(), "caption": caption.item()}
        return preference + args.caption * caption, logs | {name: v for name, v in right.items() if v == v}

    def finish(model, out):
        scores = pair_scores(model, held, device)  # (N, 2, 3)
        model.mean.copy_(scores.mean((0, 1)))
        model.std.copy_(scores.std((0, 1)).clamp(min=1e-6))
        lines = [f"{len(held)} {held_name} (accuracy without ties, with ties; share of ties):"]
        for i, name in enumerate(DIMENSIONS):
            delta, label = scores[:, 0, i] - scores[:, 1, i], held.label[:, i]
            with_ties, _ = accuracy_with_ties(delta, label)
            ties = (label == 0).sum().item() / max(1, (label != INVALID).sum().item())
            lines.append(f"  {name}  {accuracy_without_ties(delta, label):.3f}  {with_ties:.3f}  {ties:.3f}")
        return lines

    return Task("reward", model, vocabulary, batch, loss, ("loss", *DIMENSIONS), finish)


LOSSES = {  # of scores a, b (B, 3) and a batch of pairs
    "btt": lambda a, b, batch: btt_loss(a, b, batch["label"]),
    "bt": lambda a, b, batch: bt_loss(a, b, batch["label"]),
    "regression": lambda a, b, batch: regression_loss(torch.stack((a, b), 1), batch["mos"]),
}


def reward_config(args, vocabulary, words):
    """Of the preset, three quarters of its width and two thirds of its depth."""
    preset = PRESETS[args.preset]
    sizes = {field.name: getattr(preset, field.name) for field in fields(preset)}
    sizes |= {"vocab": len(vocabulary.words), "max_text": words}
    sizes |= {"dim": preset.dim * 3 // 4, "depth": preset.depth * 2 // 3}
    return RewardConfig(**sizes, separate=args.tokens == "separate")


def toy_data(args):
    """(vocabulary, config, pairs to train on, pairs of unseen prompts, their name), the toy world's."""
    vocabulary = Vocabulary()
    config = reward_config(args, vocabulary, PRESETS[args.preset].max_text)
    bar = progress_bar("annotators look at the pairs", "x64 pairs")
    pairs = annotated_pairs(args.pairs, ["train"], args.seed, config, vocabulary, bar)
    held = annotated_pairs(args.eval_pairs, ["validation"], args.seed + 1, config, vocabulary)
    return vocabulary, config, pairs, held, "validation pairs, prompts never seen in training"


def disk_data(args):
    """The same from --data and --val; without --val a tenth of the prompts is held out."""
    skipped = [] if args.skip_bad else None
    rows = read_pairs(args.data, skipped)
    if args.loss == "regression" and not any(any(row.mos) for row in rows):
        raise BadInput(f"{args.data}: --loss regression needs ratings, the columns MOS_A_VQ to MOS_B_TA")
    prompts = sorted({row.prompt for row in rows})
    vocabulary = vocabulary_of(prompts)
    longest = max(len(split_words(prompt)) for prompt in prompts)
    config = reward_config(args, vocabulary, min(longest, MOST_WORDS))

    def load(rows, path):
        bar = progress_bar(f"decoding {path.name}", "video")
        return disk_pairs(rows, path, config, vocabulary, args.cache, skipped, bar)

    if args.val:
        train_rows, held = rows, load(read_pairs(args.val, skipped), args.val)
        name = f"pairs of {args.val}"
    else:
        order = torch.randperm(len(prompts), generator=step_rng(args.seed, -1)).tolist()
        out = {prompts[i] for i in order[: max(1, len(prompts) // 10)]} if len(prompts) > 1 else set()
        train_rows = [row for row in rows if row.prompt not in out]
        held = load([row for row in rows if row.prompt in out] or rows, args.data)
        name = "pairs of prompts held out of training" if out else "training pairs, all there are of one prompt"
    pairs = load(train_rows, args.data)
    if skipped:
        print(f"skipped {len(skipped)} rows or videos: {skipped[0]}" + ("; ..." if skipped[1:] else ""))
    return vocabulary, config, pairs, held, name


@torch.no_grad()
def pair_scores(model, pairs, device, progress=lambda chunks: chunks):
    """Scores (N, 2, 3) on the CPU of both clips of all pairs, by model (videos, y) -> (B, 3)."""
    scores = []
    for index in progress(torch.arange(len(pairs)).split(64)):
        y = pairs.y[index].to(device)
        scores.append(torch.stack([model(video.to(device), y).cpu() for video in pairs.sides(index)], 1))
    return torch.cat(scores)


def nrg_task(args, device):
    base, words = load_velocity(args.init or WEIGHTS / "base.pt")
    torch.manual_seed(args.seed)
    model = noisy_reward_on(base, args.read, args.trunk == "frozen").to(device)
    vocabulary = Vocabulary(words)
    bar = progress_bar("annotators look at the pairs", "x64 pairs")
    pairs = annotated_pairs(args.pairs, ["train"], args.seed, base.config, vocabulary, bar)

    def batch(step, rng):
        return pairs.batch(epoch_index(len(pairs), args.batch, step, args.seed))

    def loss(batch, rng):
        pair = batch["video_a"], batch["video_b"], batch["y"], batch["label"]
        return noisy_reward_step(model, *pair, rng, args.time_shift, args.contrast, args.pair_noise == "shared")

    def finish(model, out):
        held = annotated_pairs(args.eval_pairs, ["validation"], args.seed + 1, base.config, vocabulary)
        scores = noisy_scores(model, held, device, args.eval_seed)
        model.std.copy_(torch.cat(list(scores.values())).std((0, 1)).clamp(min=1e-6))
        lines = [f"{len(held)} validation pairs, prompts never seen in training, accuracy without ties at each t:"]
        for t, here in scores.items():
            right = accuracies_without_ties(here[:, 0] - here[:, 1], held.label)
            lines.append(f"  t {t:.2f}  " + "  ".join(f"{n} {v:.3f}" for n, v in right.items()))
        return lines

    return Task("noisy reward", model, vocabulary, batch, loss, ("loss", *DIMENSIONS), finish, stored=stored)


@torch.no_grad()
def noisy_scores(reward, pairs, device, seed, times=(0.0, 0.2, 0.4, 0.6, 0.8, 0.9)):
    """{t: scores (N, 2, 3) on the CPU} of a noise-aware reward; both clips of a pair get the same noise."""
    rng, scores = torch.Generator().manual_seed(seed), {t: [] for t in times}
    for index in torch.arange(len(pairs)).split(64):
        y, x0 = pairs.y[index].repeat(2, 1).to(device), torch.cat(pairs.sides(index)).to(device)
        x1 = draw_noise(x0[: len(index)], rng).repeat(2, 1, 1, 1, 1)
        for t in times:
            t_all = torch.full((len(x0),), t, device=device)
            scores[t].append(torch.stack(reward(interpolate(x0, x1, t_all), t_all, y).cpu().chunk(2), 1))
    return {t: torch.cat(parts) for t, parts in scores.items()}


def dpo_task(args, device):
    base, policy, vocabulary, pairs, total, finish = alignment(args, device)
    better, worse = ranked(total)

    def batch(step, rng):
        chosen = epoch_index(len(better), args.batch, step, args.seed)
        (index, win), lose = better[chosen].T, worse[chosen, 1]
        y = drop_prompts(pairs.y[index], args.label_dropout, rng)
        return {"winner": pairs.clips(index, win), "loser": pairs.clips(index, lose), "y": y}

    both = share_trunk(policy, base, args.freeze) if args.freeze else None

    def loss(batch, rng):
        pair = batch["winner"], batch["loser"], batch["y"]
        return flow_dpo_step(policy, base, *pair, args.beta, rng, args.schedule, args.time_shift, both)

    return Task("velocity", policy, vocabulary, batch, loss, ("loss", "accuracy"), finish, args.lora_rank > 0)


def rwr_task(args, device):
    _, policy, vocabulary, pairs, total, finish = alignment(args, device)
    both = torch.cat(ranked(total))  # (2N', 2): both clips of every pair
    weight = rwr_weights(total[both[:, 0], both[:, 1]], args.temperature)
    return weighted_task(args, policy, vocabulary, pairs, both, weight, finish)


def sft_task(args, device):
    _, policy, vocabulary, pairs, total, finish = alignment(args, device)
    better, _ = ranked(total)
    return weighted_task(args, policy, vocabulary, pairs, better, torch.ones(len(better)), finish)


def weighted_task(args, policy, vocabulary, pairs, chosen, weight, finish):
    """The flow-matching loss on clips `chosen` (N, 2: pair, side) with weights (N,): two for each pair of DPO's."""

    def batch(step, rng):
        here = epoch_index(len(chosen), 2 * args.batch, step, args.seed)
        index, side = chosen[here].T
        y = drop_prompts(pairs.y[index], args.label_dropout, rng)
        return {"video": pairs.clips(index, side), "y": y, "weight": weight[here]}

    def loss(batch, rng):
        return flow_rwr_step(policy, batch["video"], batch["y"], batch["weight"], rng, args.time_shift)

    return Task("velocity", policy, vocabulary, batch, loss, ("loss", "effective_samples"), finish, args.lora_rank > 0)


TASKS = {
    "pretrain": pretrain_task,
    "reward": reward_task,
    "nrg": nrg_task,
    "sft": sft_task,
    "rwr": rwr_task,
    "dpo": dpo_task,
}


# ---------------------------------------------------------------------------------------------------------------------
# What the alignment algorithms share


def alignment(args, device):
    """The frozen base, the policy that starts from it, its vocabulary, pairs scored by VideoReward, and the comparison
    of the two that ends a run."""
    paths = args.init or WEIGHTS / "base.pt", args.reward or WEIGHTS / "reward.pt"
    (base, words), (reward, reward_words) = load_velocity(paths[0]), load_reward(paths[1])
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

    pairs, scores = scored_pairs(args.pairs, args.seed, *paths, device)
    weights = torch.tensor(args.align) / sum(map(abs, args.align))  # 1:1:1 is r = (r_VQ + r_MQ + r_TA) / 3
    return base, policy, Vocabulary(words), pairs, scores @ weights, finish


@lru_cache(maxsize=1)  # a study aligns many policies on the same pairs
def scored_pairs(count, seed, init, reward, device):
    """Pairs, and VideoReward's z-scores of both clips of each (N, 2, 3) (section 5.1).

    Offline and once, as in the paper: clips of the twelve generators, none of the policy's own."""
    base, words = load_velocity(init)
    reward, reward_words = load_reward(reward)
    if reward_words != words:
        raise BadInput("--reward and --init know different words; use a reward and a base model of the same data")
    pairs, _ = toy_pairs(count, ["train"], seed, base.config, Vocabulary(words))
    bar = progress_bar("VideoReward scores the pairs", "x64 pairs")
    return pairs, pair_scores(reward.to(device).normalised, pairs, device, bar)


def ranked(total):
    """Winners and losers (N', 2: pair, side) by total (N, 2); equal rewards make no pair."""
    index = torch.nonzero(total[:, 0] != total[:, 1])[:, 0]
    side = (total[index, 1] > total[index, 0]).long()
    return torch.stack((index, side), 1), torch.stack((index, 1 - side), 1)


def epoch_index(count, batch, step, seed):
    """Indices (batch,) of step `step` in epochs that are each a new permutation of `count` items."""
    position = torch.arange(step * batch, (step + 1) * batch)
    index = torch.empty_like(position)
    for epoch in (position // count).unique().tolist():
        here = position // count == epoch
        index[here] = torch.randperm(count, generator=step_rng(seed, -1 - epoch))[position[here] % count]
    return index

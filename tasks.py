"""What each algorithm trains: a model, a batch for each step, a loss, and the table at the end.

`train.py` runs any of these tasks in one loop. A task's batch and loss depend on the step's random generator alone, and
each process and micro-batch works on its part of it (parts.py).

    pretrain   the video model by flow matching on clips of all twelve generators            section 4.1
    reward     VideoReward on pairs that annotators compared, toy or on disk                 section 3
    sft        the video model on the winners of pairs that VideoReward ranked               section 5.2
    rwr        the video model on both clips of these pairs, weighted by their reward        section 4.3
    nrg        a small head on the base model's first blocks, on noised pairs, by BT         section 4.4
    dpo        the video model on these pairs, against its frozen start                      section 4.2

Alignment drops prompts for CFG as pretraining does (--label-dropout); the paper does not say whether its own does.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

import world
from common import WEIGHTS, BadInput, progress_bar
from compare import learned_scores, prompt_set, sample_prompts, score_table
from data import Vocabulary, clip_batch, drop_prompts, toy_pairs
from flow import draw_noise, draw_time, flow_error, interpolate
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from model import PRESETS, VideoTransformer, add_lora, freeze_trunk, load_velocity, merge_lora, share_trunk
from nrg import noisy_reward_on, noisy_reward_step, stored
from parts import valid_rows
from reward import (
    DIMENSIONS,
    INVALID,
    VideoReward,
    accuracies_without_ties,
    accuracy_with_ties,
    accuracy_without_ties,
    bt_loss,
    btt_loss,
    caption_loss,
    decided,
    load_reward,
    regression_loss,
)
from sample import CFG, sample_many, write_gif, write_sheet
from sources import disk_data, epoch_index, reward_config, toy_data


@dataclass
class Task:
    """What the loop needs to know of an algorithm."""

    kind: str  # of its checkpoint (common.py)
    model: torch.nn.Module  # the one that is trained
    vocabulary: Vocabulary
    batch: Callable  # (step, part) -> dict of tensors on the CPU, of this part of the batch
    loss: Callable  # (batch, part) -> (loss, logs); the mean over the parts is the whole batch's loss
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
    if args.data:
        vocabulary, config, pairs, _, _ = disk_data(args, held_out=False)
    else:
        vocabulary = Vocabulary()
        config = replace(PRESETS[args.preset], vocab=len(vocabulary.words))
    torch.manual_seed(args.seed)
    model = VideoTransformer(replace(config, attention=args.attention or "full")).to(device)

    def batch(step, part):
        if args.data:
            index = part.cut(epoch_index(2 * len(pairs), args.batch, step, args.seed))
            made = {"video": pairs.clips(index // 2, index % 2), "y": pairs.y[index // 2]}
        else:
            made = clip_batch(model.config, vocabulary, args.batch, part)
        return {**made, "y": drop_prompts(made["y"], args.label_dropout, part)}

    def loss(batch, part):
        x0 = batch["video"]
        t = draw_time(len(x0), part, args.time_shift, normal=True).to(device)
        error = flow_error(model, x0, draw_noise(x0, part), t, batch["y"]).mean()
        return error, {"loss": error.item()}

    def finish(model, out):
        if args.data:
            return ["no closing table: the oracle knows the toy world alone; sample.py --ckpt shows clips"]
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
    if args.data:
        vocabulary, config, pairs, judged, held_name = disk_data(args)
    else:
        vocabulary = Vocabulary()
        config = replace(PRESETS[args.preset], vocab=len(vocabulary.words))
        pairs, held, held_name = toy_data(args, config, vocabulary)
        judged = held()
    torch.manual_seed(args.seed)
    model = VideoReward(reward_config(args, config)).to(device)
    rated, counts = LOSSES[args.loss]

    def batch(step, part):
        index = epoch_index(len(pairs), args.batch, step, args.seed)
        valid = valid_rows(counts(pairs.label[index], pairs.mos[index]), part)
        return {**pairs.batch(part.cut(index)), "valid": valid}

    def loss(batch, part):
        y = batch["y"].repeat(2, 1)
        scores, words = model.scores_and_words(torch.cat((batch["video_a"], batch["video_b"])), y)  # (2B, 3)
        a, b = scores.chunk(2)
        label = batch["label"]
        preference = rated(a, b, batch)
        caption = caption_loss(words, y)
        right = accuracies_without_ties(a - b, label)
        logs = {"loss": preference.item(), "caption": caption.item()}
        return preference + args.caption * caption, logs | {name: v for name, v in right.items() if v == v}

    def finish(model, out):
        scores = pair_scores(model, judged, device)  # (N, 2, 3)
        model.mean.copy_(scores.mean((0, 1)))
        model.std.copy_(scores.std((0, 1)).clamp(min=1e-6))
        lines = [f"{len(judged)} {held_name} (accuracy without ties, with ties; share of ties):"]
        for i, name in enumerate(DIMENSIONS):
            delta, label = scores[:, 0, i] - scores[:, 1, i], judged.label[:, i]
            with_ties, _ = accuracy_with_ties(delta, label)
            ties = (label == 0).sum().item() / max(1, (label != INVALID).sum().item())
            lines.append(f"  {name}  {accuracy_without_ties(delta, label):.3f}  {with_ties:.3f}  {ties:.3f}")
        return lines

    return Task("reward", model, vocabulary, batch, loss, ("loss", *DIMENSIONS), finish)


LOSSES = {  # of scores a, b (B, 3) and a batch of pairs; and which of its labels or ratings count
    "btt": (
        lambda a, b, batch: btt_loss(a, b, batch["label"], valid=batch["valid"]),
        lambda label, mos: label != INVALID,
    ),
    "bt": (
        lambda a, b, batch: bt_loss(a, b, batch["label"], batch["valid"]),
        lambda label, mos: decided(label),
    ),
    "regression": (
        lambda a, b, batch: regression_loss(torch.stack((a, b), 1), batch["mos"], batch["valid"]),
        lambda label, mos: mos != 0,
    ),
}


@torch.no_grad()
def pair_scores(model, pairs, device, progress=lambda chunks: chunks):
    """Scores (N, 2, 3) on the CPU of both clips of all pairs, by model (videos, y) -> (B, 3)."""
    scores = []
    for index in progress(torch.arange(len(pairs)).split(64)):
        y = pairs.y[index].to(device)
        scores.append(torch.stack([model(video.to(device), y).cpu() for video in pairs.sides(index)], 1))
    return torch.cat(scores)


def nrg_task(args, device):
    base, words = load_velocity(args.init or WEIGHTS / "base.pt", args.attention)
    torch.manual_seed(args.seed)
    model = noisy_reward_on(base, args.read, args.trunk == "frozen").to(device)
    vocabulary = Vocabulary(words)
    if args.data:
        _, _, pairs, judged, held_name = disk_data(args, (words, base.config))
    else:
        pairs, toy_held, held_name = toy_data(args, base.config, vocabulary)

    def batch(step, part):
        index = epoch_index(len(pairs), args.batch, step, args.seed)
        valid, others = valid_rows(decided(pairs.label[index]), part), part.cut(pairs.y[index].roll(1, 0))
        return {**pairs.batch(part.cut(index)), "valid": valid, "other_y": others}

    def loss(batch, part):
        pair = (batch[name] for name in ("video_a", "video_b", "y", "label"))
        settings = args.time_shift, args.contrast, args.pair_noise == "shared"
        return noisy_reward_step(model, *pair, part, *settings, batch["valid"], batch["other_y"])

    def finish(model, out):
        held = judged if args.data else toy_held()
        scores = noisy_scores(model, held, device, args.eval_seed)
        model.std.copy_(torch.cat(list(scores.values())).std((0, 1)).clamp(min=1e-6))
        lines = [f"{len(held)} {held_name}, accuracy without ties at each t:"]
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

    def batch(step, part):
        chosen = part.cut(epoch_index(len(better), args.batch, step, args.seed))
        (index, win), lose = better[chosen].T, worse[chosen, 1]
        y = drop_prompts(pairs.y[index], args.label_dropout, part)
        return {"winner": pairs.clips(index, win), "loser": pairs.clips(index, lose), "y": y}

    both = share_trunk(policy, base, args.freeze) if args.freeze else None

    def loss(batch, part):
        pair = batch["winner"], batch["loser"], batch["y"]
        return flow_dpo_step(policy, base, *pair, args.beta, part, args.schedule, args.time_shift, both)

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
    """The flow-matching loss on clips `chosen` (N, 2: pair, side) with weights (N,): two for each pair of DPO's,
    so SFT sees a winner twice as often as DPO does."""

    def batch(step, part):
        here = part.cut(epoch_index(len(chosen), 2 * args.batch, step, args.seed))
        index, side = chosen[here].T
        y = drop_prompts(pairs.y[index], args.label_dropout, part)
        return {"video": pairs.clips(index, side), "y": y, "weight": weight[here]}

    def loss(batch, part):
        return flow_rwr_step(policy, batch["video"], batch["y"], batch["weight"], part, args.time_shift)

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
    (base, words), (reward, reward_words) = load_velocity(paths[0], args.attention), load_reward(paths[1])
    base, reward = base.to(device).requires_grad_(False), reward.to(device).requires_grad_(False)
    policy = copy.deepcopy(base).requires_grad_(True)
    torch.manual_seed(args.seed)
    policy = add_lora(policy, args.lora_rank, skip=args.freeze) if args.lora_rank else freeze_trunk(policy, args.freeze)
    policy = policy.to(device)  # adapters are drawn on the CPU

    def finish(policy, out):
        if args.data:
            return learned_table((base, policy), reward, pairs, args, device)
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

    if reward.config.video_shape != base.config.video_shape or reward.config.max_text != base.config.max_text:
        raise BadInput(
            "--reward and --init take clips or prompts of other sizes; train both with the same --preset or --data"
        )
    if args.data:
        _same_words(words, reward_words)
        _, _, pairs, _, _ = disk_data(args, (words, base.config), held_out=False)
        scores = pair_scores(
            reward.normalised, pairs, device, progress_bar("VideoReward scores the pairs", "x64 pairs")
        )
    else:
        pairs, scores = scored_pairs(args.pairs, args.seed, *paths, device)
    weights = torch.tensor(args.align) / sum(map(abs, args.align))  # 1:1:1 is r = (r_VQ + r_MQ + r_TA) / 3
    return base, policy, Vocabulary(words), pairs, scores @ weights, finish


@lru_cache(maxsize=1)  # a study aligns many policies on the same pairs
def scored_pairs(count, seed, init, reward, device):
    """Pairs, and VideoReward's z-scores of both clips of each (N, 2, 3) (section 5.2).

    Offline and once, as in the paper: clips of the twelve generators, none of the policy's own."""
    base, words = load_velocity(init)
    reward, reward_words = load_reward(reward)
    _same_words(words, reward_words)
    pairs, _ = toy_pairs(count, ["train"], seed, base.config, Vocabulary(words))
    bar = progress_bar("VideoReward scores the pairs", "x64 pairs")
    return pairs, pair_scores(reward.to(device).normalised, pairs, device, bar)


def _same_words(words, reward_words):
    if reward_words != words:
        raise BadInput("--reward and --init know different words; use a reward and a base model of the same data")


@torch.no_grad()
def learned_table(models, reward, pairs, args, device):
    """The closing table where there is no oracle: VideoReward on samples of base and policy for prompts of the data."""
    y = pairs.y.unique(dim=0)[: args.eval_prompts]
    rng, shape = torch.Generator().manual_seed(args.eval_seed), models[0].config.video_shape
    x1, lines = torch.randn(len(y), *shape, generator=rng), []
    for cfg in (CFG, 1.0):
        bar, learned = progress_bar(f"sampling at CFG {cfg:g}", "batch"), []
        for model in models:
            videos = sample_many(model, x1.to(device), y.to(device), bar, cfg=cfg)
            parts = zip(videos.split(64), y.to(device).split(64))
            learned.append(torch.cat([reward.normalised(*part).cpu() for part in parts]))
        table = score_table(("base", args.algo), None, learned)
        lines += [f"{len(y)} prompts of {args.data}, the same noise for both, CFG {cfg:g}", *table, ""]
    return lines[:-1]


def ranked(total):
    """Winners and losers (N', 2: pair, side) by total (N, 2); equal rewards make no pair."""
    index = torch.nonzero(total[:, 0] != total[:, 1])[:, 0]
    side = (total[index, 1] > total[index, 0]).long()
    return torch.stack((index, side), 1), torch.stack((index, 1 - side), 1)

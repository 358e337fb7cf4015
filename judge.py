"""Two models on the same prompts and noise: true scores, learned scores, win rates (section 5.2).

The paper judges its aligned models by the reward they were aligned with. Here a second judge, the
oracle, knows the truth; where the two disagree, the policy has learned the reward's mistakes.
"""

from dataclasses import replace

import torch

import world
from data import DIMENSIONS, INVALID, Vocabulary
from flow import interpolate
from model import load_velocity
from real_data.video import write_gif, write_sheet
from reward import accuracies_without_ties, accuracy_with_ties, accuracy_without_ties, load_reward
from runtime.checkpoint import check_same_data
from runtime.cli import progress_bar
from sample import CFG, sample_many

NOISE_SEED = 4321  # of the studies' samples
LEAST_CLIPS, FEW_CLIPS = 8, 100  # for the mean and spread of a reward's scores
PROBE_TIME = 0.8  # of denoised_right: where shapes were lost


def win_rate(model, base):
    """Share of prompts where `model` scores above `base`, a draw counting one half: (N, 3), (N, 3) -> (3,)."""
    return ((model > base).float() + 0.5 * (model == base).float()).mean(0)


def static_quality(videos):
    """How good the frames look without regard to prompt or motion, as VBench's quality score asks: (N,) in [0, 1], the
    mean of contrast, sharpness and the share of the mass in one place; 0 for frames that show no object."""
    seen = world.measure(videos)
    contrast = (seen["contrast"] / (1 - world.GROUND)).clamp(0, 1)
    sharp = 1 - ((seen["softness"] - world.SHARP) / (world.SOFT - world.SHARP)).clamp(0, 1)
    return (contrast + sharp + (1 - seen["stray"]).clamp(0, 1)) / 3 * seen["present"]


def mean_and_spread(values):
    """Mean and sample standard deviation, 0 of a single value."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def over_seeds(rows, column, **wanted):
    """Mean and spread of a column over the rows, dicts, that hold all of `wanted`: one a seed."""
    return mean_and_spread(
        [row[column] for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    )


def prompt_set(count, *splits):
    """`count` prompts as attributes (count, 3): those of the splits in turn, as often as it takes."""
    prompts = world.split_prompts(*splits)
    return prompts[torch.arange(count) % len(prompts)]


def sample_prompts(model, words, prompts, seed, device="cpu", **settings):
    """Clips (N, C, T, H, W) on the CPU for attributes (N, 3): one seed, the same noise for every model."""
    y = Vocabulary(words).encode_attributes(prompts, model.config.max_text)
    x1 = torch.randn(
        len(prompts), *model.config.video_shape, generator=torch.Generator().manual_seed(seed)
    )
    return sample_many(model, x1.to(device), y.to(device), **settings).cpu()


@torch.no_grad()
def z_scores(reward, videos, y, device="cpu"):
    """VideoReward's z-scores (N, 3) on the CPU of clips for prompts y (N, S)."""
    parts = [
        reward.normalised(v.to(device), w.to(device))
        for v, w in zip(videos.split(128), y.split(128))
    ]
    return torch.cat(parts).cpu()


def learned_scores(reward, words, videos, prompts, device="cpu"):
    """The same for attributes (N, 3)."""
    return z_scores(
        reward, videos, Vocabulary(words).encode_attributes(prompts, reward.config.max_text), device
    )


def score_table(names, scores, learned=None):
    """Lines of a table: each model's mean true scores (the first is the base), then the win rates of the others over it
    by the oracle and by VideoReward. names: list of str; scores, learned: lists of (N, 3). Without scores, where no
    oracle knows the clips, VideoReward's z-scores stand in their place."""
    head = "".join(f"{dimension:>7}" for dimension in DIMENSIONS)
    lines, kind = [f"{'':24}{head}"], "true score" if scores else "z-score"
    for name, score in zip(names, scores or learned):
        lines.append(
            f"{f'{name}, {kind}':24}" + "".join(f"{value:7.2f}" for value in score.mean(0).tolist())
        )
    for judge, table in (("oracle", scores), ("VideoReward", learned)):
        for name, score in zip(names[1:], table[1:] if table else []):
            wins = win_rate(score, table[0]).tolist()
            lines.append(
                f"{name + ' wins, ' + judge:24}" + "".join(f"{value:7.2f}" for value in wins)
            )
    return lines


# ---------------------------------------------------------------------------------------------
# Scores of pairs


@torch.no_grad()
def pair_scores(model, pairs, device, progress=lambda chunks: chunks):
    """Scores (N, 2, 3) on the CPU of both clips of all pairs, by model (videos, y) -> (B, 3)."""
    scores = []
    for index in progress(torch.arange(len(pairs)).split(64)):
        y = pairs.y[index].to(device)
        scores.append(
            torch.stack([model(video.to(device), y).cpu() for video in pairs.sides(index)], 1)
        )
    return torch.cat(scores)


@torch.no_grad()
def noisy_scores(reward, pairs, device, seed, times=(0.0, 0.2, 0.4, 0.6, 0.8, 0.9)):
    """{t: scores (N, 2, 3) on the CPU} of a noise-aware reward; both clips of a pair get the same noise."""
    rng, scores = torch.Generator().manual_seed(seed), {t: [] for t in times}
    for index in torch.arange(len(pairs)).split(64):
        y, x0 = pairs.y[index].repeat(2, 1).to(device), torch.cat(pairs.sides(index)).to(device)
        x1 = torch.randn(len(index), *x0.shape[1:], generator=rng).to(device).repeat(2, 1, 1, 1, 1)
        for t in times:
            t_all = torch.full((len(x0),), t, device=device)
            scores[t].append(
                torch.stack(reward(interpolate(x0, x1, t_all), t_all, y).cpu().chunk(2), 1)
            )
    return {t: torch.cat(parts) for t, parts in scores.items()}


def load_judge(path, config, words):
    """The VideoReward of a checkpoint, frozen. BadInput unless it takes the clips and prompts of such a model."""
    reward, reward_words = load_reward(path)
    check_same_data("--reward", reward.config, reward_words, "--init", config, words)
    return reward.requires_grad_(False)


def reference_for(args, base, words, device):
    """The frozen model that --reference names for Flow-DPO: the base model or a checkpoint's."""
    if args.reference in ("first", "round"):
        return base
    model, own_words = load_velocity(args.reference, args.attention)
    check_same_data("--reference", model.config, own_words, "--init", base.config, words)
    return model.to(device).requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# The tables that close a training: (model, out) -> lines; pictures go to `out`


@torch.no_grad()
def denoised_right(model, words, prompts, now, seed, device):
    """Share (3,) of clean clips of `prompts` (N, 3) whose colour, shape and direction x0_hat shows, from one step at
    t = now with their own prompt: takes a second, and falls before samples do."""
    rng = torch.Generator().manual_seed(seed)
    clips = world.draw_clips(
        prompts, torch.zeros_like(prompts[:, 0]), rng, model.config.frames, clean=True
    )
    x0 = world.render(clips, model.config.size).to(device)
    t, x1 = (
        torch.full((len(x0),), now, device=device),
        torch.randn(x0.shape, generator=rng).to(device),
    )
    x_t, y = (
        interpolate(x0, x1, t),
        Vocabulary(words).encode_attributes(prompts, model.config.max_text).to(device),
    )
    x0_hat = x_t - now * model(x_t, t, y)
    return (world.attributes_right(x0_hat.cpu(), prompts) > 0.5).float().mean(0)


def pretrain_table(model, out, words, args, device):
    """True scores, and the share of clips with the right colour, shape and direction, at CFG 1 and with guidance."""
    if args.data:
        return [
            "no closing table: the oracle knows the toy world alone; sample.py --ckpt shows clips"
        ]
    prompts = prompt_set(args.eval_prompts, "train", "validation", "hard")
    lines = []
    for cfg in (1.0, CFG):
        bar = progress_bar(f"sampling at CFG {cfg:g}", "batch")
        videos = sample_prompts(
            model, words, prompts, args.eval_seed, device, progress=bar, cfg=cfg
        )
        score = world.oracle(videos, prompts).mean(0).tolist()
        right = (world.attributes_right(videos, prompts) > 0.5).float().mean(0).tolist()
        lines.append(
            f"CFG {cfg:g}: true score "
            + " ".join(f"{n} {v:.2f}" for n, v in zip(DIMENSIONS, score))
        )
        lines[-1] += "; right " + " ".join(f"{n} {v:.2f}" for n, v in zip(world.MARGIN, right))
    right = denoised_right(model, words, prompts, PROBE_TIME, args.eval_seed, device).tolist()
    shown = " ".join(f"{n} {v:.2f}" for n, v in zip(world.MARGIN, right))
    lines.append(f"x0_hat of clean clips at t {PROBE_TIME:g}: right {shown}")
    write_gif(out / "samples.gif", list(videos[:32].split(8)))
    write_sheet(out / "samples.png", videos[:16])
    return [*lines, f"wrote {out / 'samples.gif'} and .png (CFG {CFG:g})"]


def distinct_clips(parts):
    """How many distinct clips are in a list of Pairs."""
    return len(torch.cat([pairs.clip_id.flatten() for pairs in parts]).unique())


def with_enough_clips(held, pairs):
    """`held`, {name: Pairs}, whose clips give a reward its unit; where they are few, also the first
    of `pairs`, those to train on."""
    if pairs is None or distinct_clips(held.values()) >= FEW_CLIPS:
        return held
    first = replace(pairs, y=pairs.y[:FEW_CLIPS], clip_id=pairs.clip_id[:FEW_CLIPS])
    return held | {"training pairs": first}


def unit_line(parts, std):
    """On how many distinct clips of `parts`, {name: Pairs}, the z-scores of a reward stand, as text.
    With fewer than LEAST_CLIPS, its buffer `std` becomes 0: no command loads such a checkpoint."""
    count = distinct_clips(parts.values())
    line = f"z-scores stand on {count} distinct clips"
    if count < LEAST_CLIPS:
        std.zero_()
        need = f"at least {LEAST_CLIPS} are needed, from --val or more pairs in --data"
        return f"{line}; {need}: no command will use this reward"
    if count < FEW_CLIPS:
        return f"warning: {line}, fewer than {FEW_CLIPS}: a rough unit for the weights of --align and --nrg"
    return line


def reward_table(model, out, held, device, train_pairs=None):
    """VideoReward's accuracies on pairs `held`, {name: Pairs}, whose scores also give its z-score constants, with those
    of `train_pairs` where `held` has few clips."""
    parts = with_enough_clips(held, train_pairs)
    scores = {
        name: pair_scores(model, pairs, device) for name, pairs in parts.items()
    }  # (N, 2, 3) each
    together = torch.cat(list(scores.values()))
    model.mean.copy_(together.mean((0, 1)))
    model.std.copy_(together.std((0, 1)).clamp(min=1e-6))
    lines = [unit_line(parts, model.std)]
    for name, pairs in held.items():
        lines.append(f"{len(pairs)} {name} (accuracy without ties, with ties; share of ties):")
        for i, dimension in enumerate(DIMENSIONS):
            delta, label = scores[name][:, 0, i] - scores[name][:, 1, i], pairs.label[:, i]
            with_ties, _ = accuracy_with_ties(delta, label)
            ties = (label == 0).sum().item() / max(1, (label != INVALID).sum().item())
            lines.append(
                f"  {dimension}  {accuracy_without_ties(delta, label):.3f}  {with_ties:.3f}  {ties:.3f}"
            )
    return lines


def nrg_table(model, out, held, seed, device, train_pairs=None):
    """The noise-aware reward's accuracies on pairs `held`, {name: Pairs}, by noise; their spread becomes its unit, with
    that of `train_pairs` where `held` has few clips."""
    parts = with_enough_clips(held, train_pairs)
    scores = {name: noisy_scores(model, pairs, device, seed) for name, pairs in parts.items()}
    together = [at_t for by_time in scores.values() for at_t in by_time.values()]
    model.std.copy_(torch.cat(together).std((0, 1)).clamp(min=1e-6))
    lines = [unit_line(parts, model.std)]
    for name, pairs in held.items():
        lines.append(f"{len(pairs)} {name}, accuracy without ties at each t:")
        for t, at_t in scores[name].items():
            right = accuracies_without_ties(at_t[:, 0] - at_t[:, 1], pairs.label)
            lines.append(f"  t {t:.2f}  " + "  ".join(f"{n} {v:.3f}" for n, v in right.items()))
    return lines


def alignment_table(policy, out, base, reward, words, pairs, args, device):
    """Base and policy on the same prompts and noise, by the oracle and by VideoReward if there is one; by VideoReward
    alone on the prompts of --data."""
    if args.data and reward is None:
        return [
            "no closing table: labels ranked the pairs, and the shipped VideoReward does not know this data; "
            "--reward names one that does"
        ]
    if args.data:
        return learned_table((base, policy), reward, pairs, args, device)
    prompts = prompt_set(args.eval_prompts, "train", "validation", "hard")
    lines = []
    for cfg in (1.0, CFG):  # the pictures are made with guidance, as people sample
        bar = progress_bar(f"sampling at CFG {cfg:g}", "batch")
        videos = [
            sample_prompts(m, words, prompts, args.eval_seed, device, progress=bar, cfg=cfg)
            for m in (base, policy)
        ]
        scores = [world.oracle(video, prompts) for video in videos]
        learned = (
            [learned_scores(reward, words, video, prompts, device) for video in videos]
            if reward
            else None
        )
        table = score_table(("base", args.algo), scores, learned)
        lines += [f"{args.eval_prompts} prompts, the same noise for both, CFG {cfg:g}", *table, ""]
    shown = (
        torch.arange(8) * (args.eval_prompts // 8 + 1) % args.eval_prompts
    )  # eight spread over the set
    name = f"base_above_{args.algo}"
    write_gif(out / f"{name}.gif", [video[shown] for video in videos])
    write_sheet(
        out / f"{name}.png", torch.stack([video[shown] for video in videos], 1).flatten(0, 1)
    )
    texts = "; ".join(world.prompt_text(prompt) for prompt in prompts[shown])
    return [*lines, f"wrote {out / name}.gif and .png (CFG {CFG:g}): {texts}"]


@torch.no_grad()
def learned_table(models, reward, pairs, args, device):
    """The closing table where there is no oracle: VideoReward on samples of base and policy for prompts of the data."""
    y = pairs.y.unique(dim=0)[: args.eval_prompts]
    rng, shape = torch.Generator().manual_seed(args.eval_seed), models[0].config.video_shape
    x1, lines = torch.randn(len(y), *shape, generator=rng), []
    for cfg in (1.0, CFG):
        bar, learned = progress_bar(f"sampling at CFG {cfg:g}", "batch"), []
        for model in models:
            videos = sample_many(model, x1.to(device), y.to(device), bar, cfg=cfg)
            learned.append(z_scores(reward, videos, y, device))
        table = score_table(("base", args.algo), None, learned)
        lines += [
            f"{len(y)} prompts of {args.data}, the same noise for both, CFG {cfg:g}",
            *table,
            "",
        ]
    return lines[:-1]

"""Two models on the same prompts and noise: true scores, learned scores, win rates (section 5.2).

The paper judges its aligned models by the reward they were aligned with. Here a second judge, the
oracle, knows the truth; where the two disagree, the policy has learned the reward's mistakes.
"""

from dataclasses import replace

import torch

import world
from data import DIMENSIONS, INVALID, Vocabulary
from flow import interpolate
from pictures import write_gif, write_sheet
from reward import accuracies_without_ties, accuracy_with_ties, accuracy_without_ties, load_reward
from runtime.checkpoint import check_same_data
from runtime.cli import progress_bar
from sample import CFG, sample_many

NOISE_SEED = 4321  # of the studies' samples
LEAST_CLIPS, FEW_CLIPS = 8, 100  # for the mean and spread of a reward's scores
EVERY_SPLIT = ("train", "validation", "hard")


def win_rate(model, base):
    """Share of prompts where `model` scores above `base`: (N, 3), (N, 3) -> (3,). A draw counts one
    half."""
    return ((model > base).float() + 0.5 * (model == base).float()).mean(0)


def prompt_set(count, *splits):
    """`count` prompts as attributes (count, 3): those of the splits, repeated in turn."""
    prompts = world.split_prompts(*splits)
    return prompts[torch.arange(count) % len(prompts)]


def sample_prompts(model, words, prompts, seed, device="cpu", **settings):
    """Clips (N, C, T, H, W) on the CPU for attributes (N, 3); noise depends on the seed alone."""
    y = Vocabulary(words).encode_attributes(prompts, model.config.max_text)
    rng = torch.Generator().manual_seed(seed)
    x1 = torch.randn(len(prompts), *model.config.video_shape, generator=rng)
    return sample_many(model, x1.to(device), y.to(device), **settings)


@torch.no_grad()
def z_scores(reward, videos, y, device="cpu"):
    """VideoReward's z-scores (N, 3) on the CPU of clips for prompts y (N, S)."""
    parts = []
    for start in range(0, len(y), 128):
        part = slice(start, start + 128)
        parts.append(reward.normalised(videos[part].to(device), y[part].to(device)).cpu())
    return torch.cat(parts)


def learned_scores(reward, words, videos, prompts, device="cpu"):
    """The same for attributes (N, 3)."""
    y = Vocabulary(words).encode_attributes(prompts, reward.config.max_text)
    return z_scores(reward, videos, y, device)


def score_table(true, learned):
    """Lines of a table: mean scores of each model, then win rates over the first one by the oracle
    and by VideoReward. true, learned: {model: scores (N, 3)} or None."""
    lines = [" " * 24 + "".join(f"{dimension:>7}" for dimension in DIMENSIONS)]
    kind, scores = ("true score", true) if true else ("z-score", learned)
    for name, score in scores.items():
        lines.append(table_line(f"{name}, {kind}", score.mean(0)))
    for judge, scores in (("oracle", true), ("VideoReward", learned)):
        if scores:
            (_, base), *others = scores.items()
            for name, score in others:
                lines.append(table_line(f"{name} wins, {judge}", win_rate(score, base)))
    return [*lines, "(0.50 = no change)"]


def table_line(name, values):
    return f"{name:24}" + "".join(f"{value:7.2f}" for value in values.tolist())


@torch.no_grad()
def pair_scores(model, pairs, device, progress=lambda chunks: chunks):
    """Scores (N, 2, 3) on the CPU of both clips of all pairs, by model (videos, y) -> (B, 3)."""
    scores = []
    for index in progress(torch.arange(len(pairs)).split(64)):
        y = pairs.y[index].to(device)
        sides = [model(video.to(device), y).cpu() for video in pairs.sides(index)]
        scores.append(torch.stack(sides, 1))
    return torch.cat(scores)


@torch.no_grad()
def noisy_scores(reward, pairs, device, seed, times=(0.0, 0.2, 0.4, 0.6, 0.8, 0.9)):
    """{t: scores (N, 2, 3)} of a noise-aware reward; the two clips of a pair share their noise."""
    rng, scores = torch.Generator().manual_seed(seed), {t: [] for t in times}
    for index in torch.arange(len(pairs)).split(64):
        y = pairs.y[index].repeat(2, 1).to(device)
        x0 = torch.cat(pairs.sides(index)).to(device)
        x1 = torch.randn(len(index), *x0.shape[1:], generator=rng).repeat(2, 1, 1, 1, 1).to(device)
        for now in times:
            t = torch.full((len(x0),), now, device=device)
            a, b = reward(interpolate(x0, x1, t), t, y).cpu().chunk(2)
            scores[now].append(torch.stack((a, b), 1))
    return {t: torch.cat(parts) for t, parts in scores.items()}


def load_judge(path, config, words):
    """A checkpoint's VideoReward, frozen. BadInput unless it takes a model's clips and prompts."""
    reward, reward_words = load_reward(path)
    check_same_data("--reward", reward.config, reward_words, "--init", config, words)
    return reward.requires_grad_(False)


def set_unit(model, scores):
    """Makes the mean and standard deviation of scores (N, 2, 3) a reward's zero and unit."""
    if hasattr(model, "mean"):
        model.mean.copy_(scores.mean((0, 1)))
    model.std.copy_(scores.std((0, 1)).clamp(min=1e-6))


def distinct_clips(parts):
    """How many distinct clips are in {name: Pairs}."""
    return len(torch.cat([pairs.clip_id.flatten() for pairs in parts.values()]).unique())


def calibration_pairs(held, train_pairs=None):
    """{name: Pairs} that give a reward's scores their unit: those held out and, where these hold
    few clips, also the first training pairs."""
    if train_pairs is None or distinct_clips(held) >= FEW_CLIPS:
        return held
    y, clip_id = train_pairs.y[:FEW_CLIPS], train_pairs.clip_id[:FEW_CLIPS]
    return held | {"training pairs": replace(train_pairs, y=y, clip_id=clip_id)}


def calibrate(model, scores, parts):
    """set_unit, and a line that says on how many distinct clips of `parts`, {name: Pairs}, the unit
    stands. Below LEAST_CLIPS it becomes 0, and no command loads such a checkpoint."""
    set_unit(model, scores)
    count = distinct_clips(parts)
    line = f"z-scores stand on {count} distinct clips"
    if count < LEAST_CLIPS:
        model.std.zero_()
        need = f"at least {LEAST_CLIPS} are needed, from --val or more pairs in --data"
        return f"{line}; {need}: no command will use this reward"
    if count < FEW_CLIPS:
        return f"warning: {line}, fewer than {FEW_CLIPS}: weights of --align and --nrg are rough"
    return line


def calibrate_reward(model, held, device, train_pairs=None):
    """Sets the unit of a VideoReward; lines: that, and accuracies on `held`, {name: Pairs}."""
    parts = calibration_pairs(held, train_pairs)
    scores = {name: pair_scores(model, pairs, device) for name, pairs in parts.items()}
    lines = [calibrate(model, torch.cat(list(scores.values())), parts)]
    for name, pairs in held.items():
        lines.append(f"{len(pairs)} {name} (accuracy without ties, with ties; share of ties):")
        for i, dimension in enumerate(DIMENSIONS):
            label = pairs.label[:, i]
            delta = scores[name][:, 0, i] - scores[name][:, 1, i]
            without_ties = accuracy_without_ties(delta, label)
            with_ties, _ = accuracy_with_ties(delta, label)
            ties = (label == 0).sum().item() / max(1, (label != INVALID).sum().item())
            lines.append(f"  {dimension}  {without_ties:.3f}  {with_ties:.3f}  {ties:.3f}")
    return lines


def calibrate_noisy(model, held, seed, device, train_pairs=None):
    """The same for a noise-aware reward: its unit is the spread over clips and times."""
    parts = calibration_pairs(held, train_pairs)
    scores = {name: noisy_scores(model, pairs, device, seed) for name, pairs in parts.items()}
    together = [at_t for by_time in scores.values() for at_t in by_time.values()]
    lines = [calibrate(model, torch.cat(together), parts)]
    for name, pairs in held.items():
        lines.append(f"{len(pairs)} {name}, accuracy without ties at each t:")
        for t, at_t in scores[name].items():
            right = accuracies_without_ties(at_t[:, 0] - at_t[:, 1], pairs.label)
            lines.append(f"  t {t:.2f}  " + "  ".join(f"{n} {v:.3f}" for n, v in right.items()))
    return lines


def named(names, values):
    return " ".join(f"{name} {value:.2f}" for name, value in zip(names, values.tolist()))


def pretrain_table(model, out, words, settings, device):
    """Lines: true scores and the share of clips with the right attributes, with and without CFG.
    Pictures of clips go to the folder `out`."""
    if settings.data:
        return ["no closing table: the oracle knows the toy world alone; see sample.py --ckpt"]
    prompts, seed = prompt_set(settings.eval_prompts, *EVERY_SPLIT), settings.eval_seed
    lines = []
    for cfg in (1.0, CFG):
        bar = progress_bar(f"sampling at CFG {cfg:g}", "batch")
        videos = sample_prompts(model, words, prompts, seed, device, progress=bar, cfg=cfg)
        score = named(DIMENSIONS, world.oracle(videos, prompts).mean(0))
        is_right = world.attributes_right(videos, prompts) > 0.5  # (N, 3)
        right = named(world.MARGIN, is_right.float().mean(0))
        lines.append(f"CFG {cfg:g}: true score {score}; right {right}")
    write_gif(out / "samples.gif", list(videos[:32].split(8)))
    write_sheet(out / "samples.png", videos[:16])
    return [*lines, f"wrote {out / 'samples.gif'} and .png (CFG {CFG:g})"]


def alignment_table(policy, out, base, reward, words, pairs, settings, device):
    """Lines: base and policy on the same prompts and noise, judged by the oracle and VideoReward,
    or by VideoReward alone on prompts of --data. Pictures of clips go to the folder `out`."""
    if settings.data and reward is None:
        return [
            "no closing table: labels ranked the pairs, and the shipped VideoReward does not know "
            "this data; --reward names one that does"
        ]
    models = {"base": base, settings.algo: policy}
    if settings.data:
        y = pairs.y.unique(dim=0)[: settings.eval_prompts]
        what = f"{len(y)} prompts of {settings.data}"
    else:
        prompts = prompt_set(settings.eval_prompts, *EVERY_SPLIT)
        y = Vocabulary(words).encode_attributes(prompts, base.config.max_text)
        what = f"{len(y)} prompts"
    rng = torch.Generator().manual_seed(settings.eval_seed)
    x1 = torch.randn(len(y), *base.config.video_shape, generator=rng)
    lines = []
    for cfg in (1.0, CFG):  # the pictures are of clips with guidance, as people sample
        bar = progress_bar(f"sampling at CFG {cfg:g}", "batch")
        videos = {
            name: sample_many(model, x1.to(device), y.to(device), bar, cfg=cfg)
            for name, model in models.items()
        }
        true = learned = None
        if not settings.data:
            true = {name: world.oracle(video, prompts) for name, video in videos.items()}
        if reward:
            learned = {name: z_scores(reward, video, y, device) for name, video in videos.items()}
        lines += [f"{what}, the same noise for both, CFG {cfg:g}", *score_table(true, learned), ""]
    if settings.data:
        return lines[:-1]
    return [*lines, write_comparison(out / f"base_above_{settings.algo}", videos, prompts)]


def write_comparison(path, videos, prompts):
    """Writes eight clips of each model, {name: videos}, spread over the prompts, as GIF and PNG."""
    chosen = torch.arange(8) * (len(prompts) // 8 + 1) % len(prompts)
    rows = [video[chosen] for video in videos.values()]
    write_gif(path.with_suffix(".gif"), rows)
    write_sheet(path.with_suffix(".png"), torch.stack(rows, 1).flatten(0, 1))
    texts = "; ".join(world.prompt_text(prompt) for prompt in prompts[chosen])
    return f"wrote {path}.gif and .png (CFG {CFG:g}): {texts}"

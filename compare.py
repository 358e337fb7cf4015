"""Two models on the same prompts and noise: true scores, learned scores, win rates (paper, section 5.2, "automatic").

The paper judges its aligned models by the reward they were aligned with. Here a second judge, the oracle, says what is
true; where the two part ways, the policy has learned the reward's mistakes.
"""

import torch

import world
from data import Vocabulary
from reward import DIMENSIONS
from sample import sample_many


def win_rate(model, base):
    """Share of prompts where `model` scores above `base`, a draw counting one half: (N, 3), (N, 3) -> (3,)."""
    return ((model > base).float() + 0.5 * (model == base).float()).mean(0)


def static_quality(videos):
    """How good the frames look without regard to prompt or motion, as VBench's quality score asks: (N,) in [0, 1], the
    mean of contrast, sharpness and the share of the mass in one place; 0 for frames that show no object."""
    seen = world.measure(videos)
    contrast = (seen["contrast"] / (1 - world.GROUND)).clamp(0, 1)
    sharp = 1 - ((seen["softness"] - 0.03) / 0.09).clamp(0, 1)  # between the softest and the sharpest rendered clips
    return (contrast + sharp + (1 - seen["stray"]).clamp(0, 1)) / 3 * seen["present"]


def mean_and_spread(values):
    """Mean and sample standard deviation, 0 of a single value."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def over_seeds(rows, column, **wanted):
    """Mean and spread of a column over the rows, dicts, that hold all of `wanted`: one a seed."""
    return mean_and_spread([row[column] for row in rows if all(row.get(key) == value for key, value in wanted.items())])


def prompt_set(count, *splits):
    """`count` prompts as attributes (count, 3): those of the splits in turn, as often as it takes."""
    prompts = world.split_prompts(*splits)
    return prompts[torch.arange(count) % len(prompts)]


def sample_prompts(model, words, prompts, seed, device="cpu", **settings):
    """Clips (N, C, T, H, W) on the CPU for attributes (N, 3): one seed, the same noise for every model."""
    y = Vocabulary(words).encode_attributes(prompts, model.config.max_text)
    x1 = torch.randn(len(prompts), *model.config.video_shape, generator=torch.Generator().manual_seed(seed))
    return sample_many(model, x1.to(device), y.to(device), **settings).cpu()


@torch.no_grad()
def learned_scores(reward, words, videos, prompts, device="cpu"):
    """VideoReward's z-scores (N, 3) on the CPU of clips for attributes (N, 3)."""
    y = Vocabulary(words).encode_attributes(prompts, reward.config.max_text)
    parts = [reward.normalised(v.to(device), w.to(device)) for v, w in zip(videos.split(128), y.split(128))]
    return torch.cat(parts).cpu()


def score_table(names, scores, learned=None):
    """Lines of a table: each model's mean true scores (the first is the base), then the win rates of the others over it
    by the oracle and by VideoReward. names: list of str; scores, learned: lists of (N, 3). Without scores, where no
    oracle knows the clips, VideoReward's z-scores stand in their place."""
    head = "".join(f"{dimension:>7}" for dimension in DIMENSIONS)
    lines, kind = [f"{'':24}{head}"], "true score" if scores else "z-score"
    for name, score in zip(names, scores or learned):
        lines.append(f"{f'{name}, {kind}':24}" + "".join(f"{value:7.2f}" for value in score.mean(0).tolist()))
    for judge, table in (("oracle", scores), ("VideoReward", learned)):
        for name, score in zip(names[1:], table[1:] if table else []):
            wins = win_rate(score, table[0]).tolist()
            lines.append(f"{name + ' wins, ' + judge:24}" + "".join(f"{value:7.2f}" for value in wins))
    return lines

"""VideoReward's ablations (paper, sections 3.2 and 5.1): Tables 2 and 6, Fig. 2 and 3, on the toy
world.

Every model trains on labels of the toy's annotators and is judged on pairs whose prompts it never
saw. Two rows need no training: random scores, and the oracle, whose accuracy is the ceiling, since
labels are noisy and ties depend on people. "By the truth" asks for the sign of the oracle's
difference where people would see one; there the oracle has 1.

    validation   rendered clips
    benchmark    rendered, combinations of words that no model sees (for VideoGen-RewardBench)
    base         clips of the base model at the settings of the training pairs
"""

import math
from functools import cache, partial
from itertools import product

import torch

from data import DIMENSIONS, Vocabulary
from judge import pair_scores
from real_data import toy_pairs
from real_data.toy_pairs import annotate_pairs, annotated_pairs
from reward import (
    RewardConfig,
    accuracies_without_ties,
    accuracy_with_ties,
    accuracy_without_ties,
    load_reward,
)
from runtime.checkpoint import WEIGHTS
from settings import Reward
from studies import policies
from studies.report.charts import Chart, Series, curve
from studies.report.tables import Column, Report, Table, matching, over_seeds, tabulate
from world import TIE_BELOW, TRUE_MEAN, TRUE_STD

MODELS = {  # Table 6, variants I to IV; and the default without pairs of generated clips
    "regression": {"loss": "regression", "tokens": "shared"},
    "bt-shared": {"loss": "bt", "tokens": "shared"},
    "btt-shared": {"loss": "btt", "tokens": "shared"},
    "btt-separate": {},
    "btt-rendered": {"generated": 0},
}
FRACTIONS = (0.01, 0.1)  # of the pairs, beside all of them (Fig. 2)
COMPARED = ("bt-shared", "regression")
SPLITS = {"validation": ("validation", 1), "benchmark": ("hard", 2), "base": ("validation", 3)}
SEED = 777_000  # of the pairs that judge
BINS = 12  # of |difference| in units of the mean one of decided pairs, 0.2 wide (Fig. 3)


def jobs(settings):
    queue = {}
    for model, seed in product(("random", "oracle"), range(settings.seeds)):
        queue[f"{model}-{seed}"] = partial(untrained, settings, model, seed)
    for model, seed in product(MODELS, range(settings.seeds)):
        queue[f"{model}-1-{seed}"] = partial(trained, settings, model, 1.0, seed)
    for seed, fraction, model in product(range(settings.seeds), FRACTIONS, COMPARED):
        job = partial(trained, settings, model, fraction, seed)
        queue[f"{model}-{fraction:g}-{seed}"] = job
    return queue


def untrained(settings, model, seed):
    rows = []
    for split in SPLITS:
        pairs = judged_pairs(split, settings)
        score = (pairs.truth - TRUE_MEAN) / TRUE_STD
        if model == "random":
            score = torch.randn(score.shape, generator=torch.Generator().manual_seed(seed))
        facts = {"model": model, "split": split, "seed": seed, "fraction": 1.0}
        rows.append(facts | accuracies(score, pairs))
    return rows


def trained(settings, model, fraction, seed):
    """Rows of a model trained on a share of the pairs. Its steps follow the square root of the
    share: 2 epochs of all pairs, 20 of a hundredth, which it would learn by heart in as many steps
    as for all."""
    steps = policies.steps_of(settings, "reward")
    pairs = steps * Reward.batch / 2
    flags = {"algo": "reward", "seed": seed} | MODELS[model]
    flags["steps"] = max(1, round(steps * math.sqrt(fraction)))
    flags["pairs"] = max(2, round(pairs * fraction))
    reward, _ = load_reward(policies.train(settings, f"{model}-{fraction:g}-{seed}", flags))
    reward = reward.to(settings.device).eval()
    rows = []
    for split in SPLITS:
        pairs = judged_pairs(split, settings)
        score = pair_scores(reward.normalised, pairs, settings.device)
        row = {"model": model, "split": split, "seed": seed, "fraction": fraction}
        rows.append(row | accuracies(score, pairs))
        if split == "validation":
            rows[-1] |= tied_differences(score, pairs)
    return rows


# ---------------------------------------------------------------------------------------------
# Pairs that judge


def judged_pairs(split, settings):
    """The annotated pairs of a split."""
    return annotated(split, settings.eval_pairs, settings.work / "clips", settings.device)


@cache
def annotated(split, count, clips, device):
    prompts, offset = SPLITS[split]
    seed, config = SEED + offset, RewardConfig()
    if split != "base":
        return annotated_pairs(count, [prompts], seed, config, Vocabulary())
    source = WEIGHTS / "base.pt", config, clips, device, toy_pairs.MODELS
    return annotate_pairs(*toy_pairs.generated_pairs(count, [prompts], seed, *source), seed)


# ---------------------------------------------------------------------------------------------
# Figures of a model


def accuracies(score, pairs):
    """Table 2's columns from z-scores (N, 2, 3) of pairs, and accuracies by the truth. Overall
    compares the mean of the three scores."""
    delta = score[:, 0] - score[:, 1]  # (N, 3)
    columns = {name: (delta[:, i], pairs.label[:, i]) for i, name in enumerate(DIMENSIONS)}
    columns["Overall"] = delta.mean(-1), pairs.overall
    row = {}
    for name, (difference, label) in columns.items():
        row[f"{name}_with"], _ = accuracy_with_ties(difference, label)
        row[f"{name}_without"] = accuracy_without_ties(difference, label)
    gap = (pairs.truth[:, 0] - pairs.truth[:, 1]) / TRUE_STD  # (N, 3)
    truth = torch.where(gap.abs() > TIE_BELOW, gap.sign(), 0).long()
    for name, accuracy in accuracies_without_ties(delta, truth).items():
        row[f"{name}_true"] = accuracy
    return row


def tied_differences(score, pairs):
    """Fig. 3: a histogram of |difference| of tied pairs over the mean one of decided pairs."""
    row = {}
    size = (score[:, 0] - score[:, 1]).abs()
    for i, name in enumerate(DIMENSIONS):
        is_tie = pairs.label[:, i] == 0
        tied = size[is_tie, i] / size[~is_tie, i].mean()
        histogram = torch.histc(tied, BINS, 0, 0.2 * BINS) / len(tied)
        row[f"{name}_tied_histogram"] = histogram.tolist()
    return row


# ---------------------------------------------------------------------------------------------
# The report


def report(rows):
    tables = {
        "reward-losses": losses(rows, "validation"),
        "reward-benchmark": losses(rows, "benchmark"),
        "reward-pairs": by_the_truth(rows),
    }
    validation = matching(rows, split="validation")
    pictures = {"reward_fraction": by_share(validation), "reward_ties": tied_pairs(validation)}
    introduction = "2,000 pairs of each split, unless --eval-pairs says otherwise."
    return Report("VideoReward on the toy world", introduction, tables, pictures)


def losses(rows, split):
    """Accuracy of VideoReward by its loss, with ties / without."""
    names = {
        "random": "random scores",
        "oracle": "the oracle",
        "regression": "regression on ratings",
        "bt-shared": "BT, one shared token",
        "btt-shared": "BTT, one shared token",
        "btt-separate": "BTT, separate tokens (the default)",
    }
    cells = []
    for model, label in names.items():
        own = matching(rows, model=model, split=split, fraction=1.0)
        row = [label]
        for name in (*DIMENSIONS, "Overall"):
            with_ties, _ = over_seeds(own, f"{name}_with")
            without, _ = over_seeds(own, f"{name}_without")
            row.append(f"{with_ties:.3f} / {without:.3f}")
        cells.append(row)
    title = f"Tables 2 and 6: {split} pairs"
    return Table(title, ["with ties / without", *DIMENSIONS, "Overall"], cells)


def by_the_truth(rows):
    columns = []
    for model, kind in {"btt-separate": "half generated", "btt-rendered": "rendered"}.items():
        query = {"model": model, "fraction": 1.0}
        columns += [Column(f"{n}, {kind}", f"{n}_true", query, 3) for n in DIMENSIONS]
    splits = {
        "validation": "rendered clips",
        "benchmark": "rendered clips, held-out combinations",
        "base": "the base model's clips",
    }
    lines = {label: {"split": split} for split, label in splits.items()}
    title = "By the truth: accuracy of rewards trained on rendered and on generated clips"
    return tabulate(title, ["pairs of"], rows, lines, columns)


def by_share(validation):
    """Fig. 2: accuracy, the mean of VQ, MQ and TA."""
    charts = []
    for kind in ("without", "with"):
        rows = []
        for row in validation:
            rows.append(row | {"mean": sum(row[f"{name}_{kind}"] for name in DIMENSIONS) / 3})
        series = [curve(model, rows, "fraction", "mean", model=model) for model in COMPARED]
        title = f"Validation pairs, {kind} ties"
        charts.append(Chart(title, series, "share of the training pairs", "accuracy", axis="log"))
    return charts


def tied_pairs(validation):
    """Fig. 3."""
    middles = [0.2 * i + 0.1 for i in range(BINS)]
    charts = []
    for name in DIMENSIONS:
        series = []
        for model in ("bt-shared", "btt-shared"):
            own = matching(validation, model=model, fraction=1.0)
            heights = torch.tensor([row[f"{name}_tied_histogram"] for row in own]).mean(0)
            series.append(Series(model, middles, [(height, 0.0) for height in heights.tolist()]))
        x = "|difference| (mean of decided pairs = 1)"
        charts.append(Chart(f"Tied pairs, {name}", series, x, "share of tied pairs"))
    return charts

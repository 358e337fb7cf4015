"""VideoReward's ablations (paper, sections 3.2 and 5.1): Tables 2 and 6, Fig. 2 and 3, on the toy
world.

Every model trains on labels of the toy's annotators and is judged on rendered pairs whose prompts
it never saw: of validation, and of word combinations that no model sees (the benchmark, for
VideoGen-RewardBench). Two rows need no training: random scores, and the oracle, whose accuracy is
the ceiling, since labels are noisy and ties depend on people."""

import math
from functools import cache, partial
from itertools import product

import torch

from data import DIMENSIONS, Vocabulary
from judge import pair_scores
from real_data.toy_pairs import annotated_pairs
from reward import RewardConfig, accuracy_with_ties, accuracy_without_ties, load_reward
from settings import Reward
from studies import policies
from studies.report.charts import Chart, Series, curve
from studies.report.tables import Report, Table, matching, over_seeds
from world import TRUE_MEAN, TRUE_STD

MODELS = {  # Table 6, variants I to IV
    "regression": {"loss": "regression", "tokens": "shared"},
    "bt-shared": {"loss": "bt", "tokens": "shared"},
    "btt-shared": {"loss": "btt", "tokens": "shared"},
    "btt-separate": {},
}
NAMES = {
    "random": "random scores",
    "oracle": "the oracle",
    "regression": "regression on ratings",
    "bt-shared": "BT, one shared token",
    "btt-shared": "BTT, one shared token",
    "btt-separate": "BTT, separate tokens (the default)",
}
FRACTIONS = (0.01, 0.1)  # of the pairs, beside all of them (Fig. 2)
COMPARED = ("bt-shared", "regression")
SPLITS = {"validation": ("validation", 777_001), "benchmark": ("hard", 777_002)}  # and seeds
BINS = 12  # of |difference| in units of the mean one of decided pairs, 0.2 wide (Fig. 3)


def jobs(settings):
    queue = {}
    for seed in range(settings.seeds):
        for model in ("random", "oracle"):
            queue[f"{model}-{seed}"] = partial(untrained, settings, model, seed)
        for model in MODELS:
            queue[f"{model}-1-{seed}"] = partial(trained, settings, model, 1.0, seed)
        for fraction, model in product(FRACTIONS, COMPARED):
            job = partial(trained, settings, model, fraction, seed)
            queue[f"{model}-{fraction:g}-{seed}"] = job
    return queue


@cache
def judged_pairs(split, count):
    prompts, seed = SPLITS[split]
    return annotated_pairs(count, [prompts], seed, RewardConfig(), Vocabulary())


def untrained(settings, model, seed):
    rows = []
    for split in SPLITS:
        pairs = judged_pairs(split, settings.eval_pairs)
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
        pairs = judged_pairs(split, settings.eval_pairs)
        score = pair_scores(reward.normalised, pairs, settings.device)
        row = {"model": model, "split": split, "seed": seed, "fraction": fraction}
        rows.append(row | accuracies(score, pairs))
        if split == "validation":
            rows[-1] |= tied_differences(score, pairs)
    return rows


# ---------------------------------------------------------------------------------------------
# Figures of a model


def accuracies(score, pairs):
    """Table 2's columns from z-scores (N, 2, 3) of pairs. Overall compares the mean of the three
    scores."""
    delta = score[:, 0] - score[:, 1]  # (N, 3)
    columns = {name: (delta[:, i], pairs.label[:, i]) for i, name in enumerate(DIMENSIONS)}
    columns["Overall"] = delta.mean(-1), pairs.overall
    row = {}
    for name, (difference, label) in columns.items():
        row[f"{name}_with"], _ = accuracy_with_ties(difference, label)
        row[f"{name}_without"] = accuracy_without_ties(difference, label)
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
    tables = {f"reward-{split}": losses(rows, split) for split in SPLITS}
    validation = matching(rows, split="validation")
    pictures = {"reward_fraction": by_share(validation), "reward_ties": tied_pairs(validation)}
    introduction = "2,000 pairs of each split, unless --eval-pairs says otherwise."
    return Report("VideoReward on the toy world", introduction, tables, pictures)


def losses(rows, split):
    """Accuracy of VideoReward by its loss, with ties / without."""
    cells = []
    for model, label in NAMES.items():
        own = matching(rows, model=model, split=split, fraction=1.0)
        row = [label]
        for name in (*DIMENSIONS, "Overall"):
            with_ties, _ = over_seeds(own, f"{name}_with")
            without, _ = over_seeds(own, f"{name}_without")
            row.append(f"{with_ties:.3f} / {without:.3f}")
        cells.append(row)
    title = f"Tables 2 and 6: {split} pairs"
    return Table(title, ["with ties / without", *DIMENSIONS, "Overall"], cells)


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

"""VideoReward's ablations (paper, sections 3.2 and 5.1): Tables 2 and 6, Fig. 2 and 3, on the toy
world.

Every model trains on labels of the toy's annotators and is judged on pairs whose prompts it never
saw. Two rows need no training: random scores, and the oracle, whose accuracy is the ceiling, since
labels are noisy and ties depend on people. "By the truth" asks for the sign of the oracle's
difference where people would see one; there the oracle has 1.

    validation   rendered clips
    benchmark    rendered, combinations of words that no model sees (for VideoGen-RewardBench)
    base         clips of the base model at the settings of the training pairs
    policy       clips of a Flow-DPO policy, which no reward has seen
    cfg3         clips of the base model at a CFG that no reward has seen
"""

import math
import os
from functools import cache, partial
from itertools import product

import torch

from data import DIMENSIONS, Vocabulary
from judge import over_seeds, pair_scores
from real_data import generated
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
from studies.report.charts import Chart, Series
from studies.report.tables import Column, Table, matching, means, melted, tabulate
from world import TIE_BELOW, TRUE_MEAN, TRUE_STD

MODELS = {  # Table 6, variants I to IV
    "regression": {"loss": "regression", "tokens": "shared"},
    "bt-shared": {"loss": "bt", "tokens": "shared"},
    "btt-shared": {"loss": "btt", "tokens": "shared"},
    "btt-separate": {},
}
RENDERED_ONLY = {"btt-rendered": {"generated": 0}}  # the default without pairs of generated clips
FRACTIONS = (0.01, 0.1)  # of the pairs, beside all of them (Fig. 2)
COMPARED = ("bt-shared", "regression")
SPLITS = {"validation": ("validation", 1), "benchmark": ("hard", 2)}  # the world's split, a seed
GENERATED = {
    "base": generated.MODELS,
    "policy": {"policy": {}},
    "cfg3": {"base-cfg3": {"cfg": 3.0}},
}
EVALUATION_SEED = 777_000
BINS = 12  # of |difference| in units of the mean one of decided pairs, 0.2 wide (Fig. 3)


def jobs(settings):
    queue = {}
    for model, seed in product(("random", "oracle"), range(settings.seeds)):
        queue[f"{model}-{seed}"] = partial(untrained, settings, model, seed)
    for model, seed in product((*reversed(MODELS), *RENDERED_ONLY), range(settings.seeds)):
        queue[f"{model}-1-{seed}"] = partial(trained, settings, model, 1.0, seed)
    for seed, fraction, model in product(range(settings.seeds), FRACTIONS, COMPARED):
        job = partial(trained, settings, model, fraction, seed)
        queue[f"{model}-{fraction:g}-{seed}"] = job
    return queue


def untrained(settings, model, seed):
    rows = []
    for split, pairs in every_split(settings).items():
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
    flags = {"algo": "reward", "seed": seed} | (MODELS | RENDERED_ONLY)[model]
    flags["steps"] = max(1, round(steps * math.sqrt(fraction)))
    flags["pairs"] = max(2, round(pairs * fraction))
    reward, _ = load_reward(policies.train(settings, f"{model}-{fraction:g}-{seed}", flags))
    reward = reward.to(settings.device).eval()
    rows = []
    for split, pairs in every_split(settings).items():
        score = pair_scores(reward.normalised, pairs, settings.device)
        row = {"model": model, "split": split, "seed": seed, "fraction": fraction}
        row |= accuracies(score, pairs)
        if split == "validation":
            row |= tied_differences(score, pairs)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Pairs that judge


def every_split(settings):
    """{split: its pairs}."""
    makers = {"base": WEIGHTS / "base.pt", "policy": policy(settings), "cfg3": WEIGHTS / "base.pt"}
    pairs = {}
    for name in (*SPLITS, *GENERATED):
        folder = settings.work / "clips"
        pairs[name] = judged_pairs(
            name, settings.eval_pairs, makers.get(name), folder, settings.device
        )
    return pairs


@cache
def judged_pairs(split, count, maker, clips, device):
    """`count` annotated pairs of a split; those of GENERATED show clips of the checkpoint
    `maker`."""
    config = RewardConfig()
    if split in SPLITS:
        name, offset = SPLITS[split]
        return annotated_pairs(count, [name], EVALUATION_SEED + offset, config, Vocabulary())
    seed = EVALUATION_SEED + 3
    source = maker, config, clips, device, GENERATED[split]
    return annotate_pairs(*generated.generated_pairs(count, ["validation"], seed, *source), seed)


def policy(settings):
    """The checkpoint of a Flow-DPO policy, trained once. If two processes train it at the same
    time, both get the same weights."""
    path = settings.folder("reward") / "policy.pt"
    if not path.exists():
        checkpoint = policies.train(settings, f"policy-{os.getpid()}", {"algo": "dpo"})
        os.replace(checkpoint, path)
    return path


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
        row[f"{name}_ties"] = (label == 0).float().mean().item()
    gap = (pairs.truth[:, 0] - pairs.truth[:, 1]) / TRUE_STD  # (N, 3)
    truth = torch.where(gap.abs() > TIE_BELOW, gap.sign(), 0).long()
    for name, accuracy in accuracies_without_ties(delta, truth).items():
        row[f"{name}_true"] = accuracy
    for name, count in zip(DIMENSIONS, (truth != 0).sum(0).tolist()):
        row[f"{name}_pairs"] = count
    return row


def tied_differences(score, pairs):
    """Fig. 3: the mean |difference| of tied pairs over that of decided ones, and its histogram."""
    row = {}
    size = (score[:, 0] - score[:, 1]).abs()
    for i, name in enumerate(DIMENSIONS):
        is_tie = pairs.label[:, i] == 0
        tied = size[is_tie, i] / size[~is_tie, i].mean()
        row[f"{name}_tied"] = tied.mean().item()
        row[f"{name}_tied_histogram"] = (
            torch.histc(tied, BINS, 0, 0.2 * BINS) / len(tied)
        ).tolist()
    return row


# ---------------------------------------------------------------------------------------------
# The report


def report(settings, rows):
    validation = []
    for row in matching(rows, split="validation"):
        for kind in ("with", "without"):
            row = row | {kind: sum(row[f"{name}_{kind}"] for name in DIMENSIONS) / 3}
        validation.append(row)
    complete = matching(rows, fraction=1.0)
    return {
        "title": "VideoReward on the toy world",
        "introduction": [f"{settings.eval_pairs} pairs of each split."],
        "tables": tables(complete, validation),
        "pictures": charts(validation),
    }


def tables(rows, validation):
    """Tables 2 and 6 of both rendered splits, accuracies by the truth, and Fig. 2 and 3 as
    numbers."""
    made = {
        "reward-losses": losses(rows, "validation"),
        "reward-benchmark": losses(rows, "benchmark"),
    }

    splits = {
        "validation": "rendered clips",
        "benchmark": "rendered clips, held-out combinations",
        "base": "the base model's clips",
        "policy": "clips of a Flow-DPO policy",
        "cfg3": "the base model's clips at CFG 3",
    }
    columns = []
    for model, kind in {"btt-separate": "half generated", "btt-rendered": "rendered"}.items():
        columns += [Column(f"{n}, {kind}", f"{n}_true", {"model": model}, 3) for n in DIMENSIONS]
    lines = {label: {"split": split} for split, label in splits.items()}
    title = "By the truth: accuracy on rendered and on generated clips"
    made["reward-pairs"] = tabulate(title, ["pairs of"], rows, lines, columns)

    columns = [Column(f"{share:g}", "value", {"fraction": share}, 3) for share in (*FRACTIONS, 1.0)]
    lines = {}
    for kind, model in product(("without", "with"), COMPARED):
        lines[f"{model}, {kind} ties"] = {"model": model, "name": kind}
    title = "Fig. 2: validation accuracy, mean of VQ, MQ and TA, by share of the training pairs"
    by_share = melted(validation, ("without", "with"))
    made["reward-fractions"] = tabulate(title, [""], by_share, lines, columns)

    columns = [Column(name, f"{name}_tied", digits=3) for name in DIMENSIONS]
    lines = {model: {"model": model} for model in MODELS}
    title = "Fig. 3: mean |difference| of tied validation pairs, that of decided pairs being 1"
    own = matching(validation, fraction=1.0)
    made["reward-ties"] = tabulate(title, [""], own, lines, columns)
    return made


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
        row = [label]
        for name in (*DIMENSIONS, "Overall"):
            query = {"model": model, "split": split}
            pair = (over_seeds(rows, f"{name}_{kind}", **query) for kind in ("with", "without"))
            row.append(" / ".join(f"{mean:.3f}" for mean, _ in pair))
        cells.append(row)
    title = f"Tables 2 and 6: {split} pairs"
    return Table(title, ["with ties / without", *DIMENSIONS, "Overall"], cells)


def charts(validation):
    """Fig. 2 and 3 as {picture: charts}."""
    shares = (*FRACTIONS, 1.0)
    fractions, ties = [], []
    for kind in ("without", "with"):
        series = []
        for model in COMPARED:
            series.append(
                Series(model, shares, means(validation, kind, "fraction", shares, model=model))
            )
        title = f"Validation pairs, {kind} ties"
        fractions.append(
            Chart(title, series, "share of the training pairs", "accuracy", axis="log")
        )
    middles = [0.2 * i + 0.1 for i in range(BINS)]
    for name in DIMENSIONS:
        series = []
        for model in ("bt-shared", "btt-shared"):
            own = matching(validation, model=model, fraction=1.0)
            heights = torch.tensor([row[f"{name}_tied_histogram"] for row in own])
            points = [(height, 0.0) for height in heights.reshape(-1, BINS).mean(0).tolist()]
            series.append(Series(model, middles, points))
        x = "|difference| (mean of decided pairs = 1)"
        ties.append(Chart(f"Tied pairs, {name}", series, x, "share of tied pairs"))
    return {"reward_fraction": fractions, "reward_ties": ties}

"""VideoReward's ablations (paper, sections 3.2 and 5.1): Tables 2 and 6, Fig. 2 and 3, on the toy world.

Every model is trained by train.py's own task on labels of the toy's annotators and judged on pairs whose prompts it
never saw. Two rows need no training: random scores, and the oracle, whose accuracy is the ceiling: labels are noisy,
and ties depend on people. By the truth, the sign of the oracle's difference where people would see one, it is 1.

    validation   rendered clips; with the base model's, these prompts also give a reward's z-score constants
    benchmark    rendered, combinations of words that no model here ever sees (the stand-in for VideoGen-RewardBench)
    base         clips of the base model at the settings that the pairs to train on were sampled at
    policy       of a Flow-DPO policy, which no reward here has seen
    cfg3         of the base model at a CFG that no reward here has seen
"""

import math
import os
from functools import cache, partial

import torch

import tasks
import trainer
from data import DIMENSIONS, Vocabulary
from judge import mean_and_spread, over_seeds, pair_scores
from real_data import generated
from real_data.toy_pairs import annotate_pairs, annotated_pairs
from reward import RewardConfig, accuracies_without_ties, accuracy_with_ties, accuracy_without_ties
from runtime.checkpoint import WEIGHTS
from settings import Reward, settings_of
from studies.jobs import settings_for
from studies.report.charts import Chart
from studies.report.tables import Table, plus_minus
from world import TIE_BELOW, TRUE_MEAN, TRUE_STD

SHARED = ["--tokens", "shared"]
MODELS = {  # Table 6, variants I to IV
    "regression": ["--loss", "regression", *SHARED],
    "bt-shared": ["--loss", "bt", *SHARED],
    "btt-shared": ["--loss", "btt", *SHARED],
    "btt-separate": [],
}
RENDERED_ONLY = {
    "btt-rendered": ["--generated", "0"]
}  # the default, without pairs of generated clips
FRACTIONS = (0.01, 0.1)  # of the pairs, beside all of them (Fig. 2)
COMPARED = ("bt-shared", "regression")
SPLITS = {
    "validation": ("validation", 1),
    "benchmark": ("hard", 2),
}  # the world's split, and a seed of its own
GENERATED = {
    "base": generated.MODELS,
    "policy": {"policy": {}},
    "cfg3": {"base-cfg3": {"cfg": 3.0}},
}
EVALUATION_SEED = 777_000
BINS = 12  # of |difference| in units of the mean one of decided pairs, 0.2 wide (Fig. 3)


@cache
def judged_pairs(split, count, maker, cache, device):
    """`count` annotated pairs of a split, of the clips of the checkpoint `maker` where it is one of GENERATED."""
    if split in SPLITS:
        name, offset = SPLITS[split]
        return annotated_pairs(
            count, [name], EVALUATION_SEED + offset, RewardConfig(), Vocabulary()
        )
    seed, settings = EVALUATION_SEED + 3, (maker, RewardConfig(), cache, device, GENERATED[split])
    return annotate_pairs(*generated.generated_pairs(count, ["validation"], seed, *settings), seed)


def every_split(args, device):
    """{split: its pairs}."""
    makers = {
        "base": WEIGHTS / "base.pt",
        "policy": policy(args, device),
        "cfg3": WEIGHTS / "base.pt",
    }
    made = (args.work / "clips", device)
    return {
        name: judged_pairs(name, args.eval_pairs, makers.get(name), *made)
        for name in (*SPLITS, *GENERATED)
    }


def policy(args, device):
    """The checkpoint of a Flow-DPO policy, trained once; should two processes do so, both find the same weights."""
    path = args.work / folder(args) / "policy.pt"
    if not path.exists():
        out = path.with_name(f"policy-{os.getpid()}")
        settings = settings_for(["--algo=dpo"], out, args)
        trainer.fit(tasks.TASKS["dpo"](settings, device), settings, device)
        os.replace(out / "last.pt", path)
    return path


def accuracies(score, pairs):
    """Table 2's columns from z-scores (N, 2, 3) of pairs, and accuracies by the truth; Overall is the mean of three."""
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
    row |= {f"{name}_true": value for name, value in accuracies_without_ties(delta, truth).items()}
    return row | {
        f"{name}_pairs": count for name, count in zip(DIMENSIONS, (truth != 0).sum(0).tolist())
    }


def tied_differences(score, pairs):
    """Fig. 3 as numbers: the mean |difference| of tied pairs over that of decided ones, and its histogram."""
    row = {}
    size = (score[:, 0] - score[:, 1]).abs()
    for i, name in enumerate(DIMENSIONS):
        tied, decided = size[pairs.label[:, i] == 0, i], size[pairs.label[:, i] != 0, i].mean()
        row[f"{name}_tied"] = (tied.mean() / decided).item()
        row[f"{name}_tied_histogram"] = (
            torch.histc(tied / decided, BINS, 0, 0.2 * BINS) / len(tied)
        ).tolist()
    return row


def untrained(model, seed, args, device):
    rows = []
    for split, pairs in every_split(args, device).items():
        if model == "oracle":
            score = (pairs.truth - TRUE_MEAN) / TRUE_STD
        else:
            score = torch.randn(pairs.truth.shape, generator=torch.Generator().manual_seed(seed))
        rows.append(
            {
                "model": model,
                "split": split,
                "seed": seed,
                "fraction": 1.0,
                **accuracies(score, pairs),
            }
        )
    return rows


def trained(model, fraction, seed, args, device):
    """Trains one model on a share of the pairs. Steps go with the square root of the share, 2 epochs of all pairs
    and 20 of a hundredth; with as many steps as for all, a hundredth would be learned by heart."""
    steps = args.steps or Reward.steps
    batch = Reward.batch
    flags = {
        "steps": max(1, round(steps * math.sqrt(fraction))),
        "pairs": max(2, round(steps * batch / 2 * fraction)),
    }
    flags |= {
        "seed": seed,
        "out": args.work / "reward" / f"{model}-{fraction:g}-{seed}",
        "save-every": 10**9,
    }
    flags["eval-pairs"] = min(1000, args.eval_pairs)
    kind = (MODELS | RENDERED_ONLY)[model]
    settings = settings_of(
        ["--algo", "reward", *kind, *(f"--{k}={v}" for k, v in flags.items())]
    )
    task = tasks.TASKS["reward"](settings, device)
    trainer.fit(task, settings, device)
    network, rows = task.model.eval(), []
    for split, pairs in every_split(args, device).items():
        score = pair_scores(network.normalised, pairs, device)
        row = {
            "model": model,
            "split": split,
            "seed": seed,
            "fraction": fraction,
            **accuracies(score, pairs),
        }
        rows.append(row | (tied_differences(score, pairs) if split == "validation" else {}))
    return rows


def folder(args):
    return f"reward-{args.steps or Reward.steps}-{args.eval_pairs}"


def jobs(args, device):
    made = {}
    for model in ("random", "oracle"):
        for seed in range(args.seeds):
            made[f"{model}-{seed}"] = partial(untrained, model, seed, args, device)
    for model in (*reversed(MODELS), *RENDERED_ONLY):  # the paper's own first
        for seed in range(args.seeds):
            made[f"{model}-1-{seed}"] = partial(trained, model, 1.0, seed, args, device)
    for seed in range(args.seeds):
        for fraction in FRACTIONS:
            for model in COMPARED:
                made[f"{model}-{fraction:g}-{seed}"] = partial(
                    trained, model, fraction, seed, args, device
                )
    return made


# ---------------------------------------------------------------------------------------------
# The report


def report(args, rows):
    figure = partial(over_seeds, rows)
    tables = []
    columns = [
        f"{name}_{kind}" for name in (*DIMENSIONS, "Overall") for kind in ("with", "without")
    ]
    for split in SPLITS:
        ties = ", ".join(
            f"{n} {figure(f'{n}_ties', model='oracle', split=split)[0]:.2f}" for n in DIMENSIONS
        )
        cells = []
        for model in ("random", "oracle", *MODELS):
            figures = (figure(column, model=model, split=split, fraction=1.0) for column in columns)
            cells.append([model, *(plus_minus(value, 3) for value in figures)])
        title = f"Tables 2 and 6: {split}, {args.eval_pairs} pairs (ties: {ties})"
        tables.append(
            Table(title, ["model", *(f"{c.replace('_', ' ')} ties" for c in columns)], cells)
        )

    columns, cells = [(split, name) for split in (*SPLITS, *GENERATED) for name in DIMENSIONS], []
    for model in (*MODELS, *RENDERED_ONLY):
        figures = (
            figure(f"{n}_true", model=model, split=split, fraction=1.0) for split, n in columns
        )
        cells.append([model, *(plus_minus(value, 3) for value in figures)])
    counts = (figure(f"{n}_pairs", model="oracle", split=split)[0] for split, n in columns)
    cells.append(["pairs", *(f"{count:.0f}" for count in counts)])
    title = "By the truth: accuracy on rendered and on generated clips"
    tables.append(Table(title, ["model", *(" ".join(column) for column in columns)], cells))

    shares, curves, cells = (*FRACTIONS, 1.0), {}, []
    for kind in ("without", "with"):
        for model in COMPARED:
            curves[kind, model] = []
            for share in shares:
                here = [
                    r
                    for r in rows
                    if (r["model"], r["split"], r["fraction"]) == (model, "validation", share)
                ]
                means = [sum(r[f"{n}_{kind}"] for n in DIMENSIONS) / 3 for r in here]
                curves[kind, model].append(mean_and_spread(means))
            cells.append(
                [f"{model}, {kind} ties", *(plus_minus(value, 3) for value in curves[kind, model])]
            )
    title = "Fig. 2: accuracy on validation pairs, mean of VQ, MQ and TA, by share of the training pairs"
    tables.append(Table(title, ["", *(f"{share:g}" for share in shares)], cells))

    cells = []
    for model in MODELS:
        tied = (
            figure(f"{n}_tied", model=model, split="validation", fraction=1.0) for n in DIMENSIONS
        )
        cells.append([model, *(plus_minus(value, 3) for value in tied)])
    title = "Fig. 3: mean |difference| of tied validation pairs, that of decided pairs being 1"
    tables.append(Table(title, ["", *DIMENSIONS], cells))
    tables.append(findings(figure, curves, shares, args.seeds))

    fractions, ties = [], []
    for kind in ("without", "with"):
        series = [(m, shares, *zip(*curves[kind, m])) for m in COMPARED]
        fractions.append(
            Chart(f"validation, {kind} ties", series, "share of the pairs", "accuracy", log=True)
        )
    middles = [0.2 * i + 0.1 for i in range(BINS)]
    for name in DIMENSIONS:
        series = []
        for model in ("bt-shared", "btt-shared"):
            here = [
                r
                for r in rows
                if (r["model"], r["split"], r["fraction"]) == (model, "validation", 1.0)
            ]
            heights = (
                torch.tensor([r[f"{name}_tied_histogram"] for r in here])
                .reshape(-1, BINS)
                .mean(0)
                .tolist()
            )
            series.append((model, middles, heights, None))
        ties.append(Chart(name, series, "|difference| (decided = 1)", "share of tied pairs"))
    return {
        "rows": rows,
        "title": "VideoReward on the toy world",
        "introduction": [],
        "tables": tables,
        "pictures": {"reward_fraction": fractions, "reward_ties": ties},
    }


def findings(figure, curves, shares, seeds):
    """The paper's findings on the reward model held against these numbers: validation pairs, mean over the seeds."""
    rows = []

    def held_out(model, column):
        return figure(column, model=model, split="validation", fraction=1.0)

    def compare(text, first, second, kind, names, test):
        pairs = [(held_out(first, f"{n}_{kind}"), held_out(second, f"{n}_{kind}")) for n in names]
        said = ", ".join(
            f"{n} {a[0]:.3f} ± {a[1]:.3f} / {b[0]:.3f} ± {b[1]:.3f}"
            for n, (a, b) in zip(names, pairs)
        )
        rows.append([text, "yes" if all(test(a, b) for a, b in pairs) else "no", said])

    def above(a, b):
        return a[0] > b[0]

    def equal(
        a, b
    ):  # within two standard errors of the difference of two means over the seeds, or half a point
        return abs(a[0] - b[0]) < max(0.005, 2 * math.sqrt((a[1] ** 2 + b[1] ** 2) / seeds))

    compare(
        "BTT above BT with ties, in VQ and MQ",
        "btt-shared",
        "bt-shared",
        "with",
        ("VQ", "MQ"),
        above,
    )
    compare("BTT equals BT without ties", "btt-shared", "bt-shared", "without", DIMENSIONS, equal)
    compare(
        "separate tokens above shared in MQ and TA",
        "btt-separate",
        "btt-shared",
        "without",
        ("MQ", "TA"),
        above,
    )
    compare(
        "separate tokens a little below shared in VQ",
        "btt-shared",
        "btt-separate",
        "without",
        ("VQ",),
        above,
    )
    compare(
        "tied pairs closer to 0 under BTT than BT",
        "bt-shared",
        "btt-shared",
        "tied",
        DIMENSIONS,
        above,
    )
    for kind in ("without", "with"):
        bt, regression = (curves[kind, model] for model in COMPARED)
        said = ", ".join(
            f"{share:g}: {a[0]:.3f} / {b[0]:.3f}" for share, a, b in zip(shares, bt, regression)
        )
        holds = all(above(a, b) for a, b in zip(bt, regression))
        rows.append(
            [
                f"BT above regression at every share of the data, {kind} ties",
                "yes" if holds else "no",
                said,
            ]
        )
    for split in SPLITS:
        shares_of_ceiling = []
        for name in DIMENSIONS:
            wanted = {"split": split, "fraction": 1.0}
            own, top = (
                figure(f"{name}_without", model=m, **wanted)[0] for m in ("btt-separate", "oracle")
            )
            shares_of_ceiling.append(own / top)
        said = ", ".join(
            f"{name} {share:.3f}" for name, share in zip(DIMENSIONS, shares_of_ceiling)
        )
        holds = "yes" if min(shares_of_ceiling) >= 0.95 else "no"
        rows.append(
            [
                f"(ours) separate BTT has 95 % of the oracle's accuracy without ties, {split}",
                holds,
                said,
            ]
        )
    title = "What the paper finds, and what is found here (validation pairs)"
    return Table(title, ["finding", "here", "figures"], rows, "findings")

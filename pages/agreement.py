"""Labels of several people as one, and how far labels agree: with second answers, with other
people's, and on the toy with oracle, annotators and VideoReward."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import median

import torch

import world
from data import DIMENSIONS, INVALID, Vocabulary
from judge import pair_scores
from real_data.dataset import pairs_of, usable_rows
from real_data.pairs_csv import LABELS, read_pairs, write_pairs
from real_data.toy_pairs import annotate_pairs
from reward import btt_probabilities, load_reward
from runtime.checkpoint import WEIGHTS
from settings import Data

CACHE = Path("out/clips")  # of decoded clips
AGAIN = "-2"  # ends the name of a question that is a pair's second
NO_LABEL = (None, None, None)


def identity(pair):
    """A pair's name, which tells nothing of its files and stays when rows move."""
    return sha256("\0".join((*pair.paths, pair.prompt)).encode()).hexdigest()[:16]


def label_of(answers):
    """VQ, MQ and TA of {dimension: record}, None where there is no answer."""
    return tuple(LABELS[answers[d]["label"]] if d in answers else None for d in DIMENSIONS)


def labels_of(path, rows):
    """The labels (N, 3) that the CSV at `path` has for `rows`, None where there is none."""
    labels = {identity(row): row.label for row in read_pairs(path, unlabelled=True)}
    return [labels.get(identity(row), NO_LABEL) for row in rows]


def merge(csv, files, out):
    """Writes the pairs of a CSV with the labels that all `files` agree on, else with its own, which
    are a reviewer's (paper, section 3.1). -> a line that says how many pairs lack a label."""
    rows = read_pairs(csv, unlabelled=True)
    people = [labels_of(file, rows) for file in files]
    for i, row in enumerate(rows):
        label = list(row.label)
        for k in range(len(DIMENSIONS)):
            votes = {labels[i][k] for labels in people}
            if len(votes) == 1 and None not in votes:
                label[k] = votes.pop()
        rows[i] = replace(row, label=tuple(label))
    write_pairs(rows, out)
    missing = sum(None in row.label for row in rows)
    return f"wrote {out}: {len(rows)} pairs, {missing} of them with a label left to a reviewer"


def agreement(label, other):
    """Share of equal labels (N,) among those valid in both, and Cohen's kappa: 1 for equal labels,
    0 for independent ones. nan where they are not defined."""
    valid = (label != INVALID) & (other != INVALID)
    label, other = label[valid], other[valid]
    equal = (label == other).float().mean()
    chance = sum((label == k).float().mean() * (other == k).float().mean() for k in (1, 0, -1))
    return equal.item(), ((equal - chance) / (1 - chance)).item()


def toy_judges(rows, csv):
    """{judge: labels (N, 3)} of toy pairs by their pixels; {} where a prompt is not the toy's."""
    try:
        attributes = world.prompt_attributes([row.prompt for row in rows])
    except ValueError:
        return {}
    reward, words = load_reward(WEIGHTS / "reward.pt")
    settings = Data(cache=CACHE)
    rows, _ = usable_rows(rows, csv, reward.config, settings)
    pairs = pairs_of(rows, csv, reward.config, Vocabulary(words), settings)
    annotated = annotate_pairs(pairs, attributes, seed=0)
    a, b = annotated.truth.unbind(1)
    difference = (a - b) / world.TRUE_STD
    oracle = torch.sign(difference).long() * (difference.abs() > world.TIE_BELOW)
    a, b = pair_scores(reward, pairs, "cpu").unbind(1)
    a_wins, b_wins, tie = btt_probabilities(a - b)
    learned = torch.stack((b_wins, tie, a_wins)).argmax(0) - 1
    judges = {"oracle": oracle, "toy annotators": annotated.label, "VideoReward": learned}
    return {name: label.tolist() for name, label in judges.items()}


def report(csv, records, others):
    """Lines on the labels of a CSV and the answers {question: {dimension: record}} behind them,
    beside other CSV files and the toy's judges."""
    rows = [row for row in read_pairs(csv, unlabelled=True) if None not in row.label]
    if not rows:
        raise ValueError(f"{csv}: no pair has all its labels yet")
    table = {}
    seen = [
        [answers[d]["seen"] for answers in records.values() if d in answers] for d in DIMENSIONS
    ]
    for side in ("left", "right", "same"):
        table[side] = [sides.count(side) / max(1, len(sides)) for sides in seen]
    judges = {"asked again": [label_of(records.get(identity(row) + AGAIN, {})) for row in rows]}
    judges |= {other.name: labels_of(other, rows) for other in others}
    label = torch.tensor([row.label for row in rows])
    for name, labels in (judges | toy_judges(rows, csv)).items():
        other = torch.tensor([[INVALID if x is None else x for x in three] for three in labels])
        columns = [agreement(label[:, i], other[:, i]) for i in range(len(DIMENSIONS))]
        table[f"{name}, equal"], table[f"{name}, kappa"] = zip(*columns)
    lines = [f"{csv.name}: {len(rows)} pairs, {seconds_a_pair(records):.1f} seconds a pair"]
    lines.append(f"{'':26}" + "".join(f"{dimension:>7}" for dimension in DIMENSIONS))
    for name, values in table.items():
        lines.append(f"{name:26}" + "".join(f"{value:7.2f}" for value in values))
    return lines


def seconds_a_pair(records):
    """Median over the questions, 0 without any."""
    seconds = [answers["TA"]["seconds"] for answers in records.values() if "TA" in answers]
    return median(seconds) if seconds else 0.0

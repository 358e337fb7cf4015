"""What people said of pairs: the journal, labels of several people as one, and how far labels agree
when asked again, with other people's, and on the toy with oracle, annotators and VideoReward."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from statistics import median

import torch

import world
from data import DIMENSIONS, INVALID, Vocabulary
from judge import pair_scores
from real_data.disk_pairs import disk_pairs
from real_data.pairs_csv import LABELS, read_pairs, write_pairs
from real_data.toy_pairs import annotate_pairs
from reward import btt_probabilities, load_reward
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput

CACHE = "out/clips"  # of decoded clips
AGAIN = "-2"  # ends the name of a question that is a pair's second
NOTHING = (None, None, None)  # labels of nobody


def identity(pair):
    """A pair's name, which tells nothing of its files and stays when rows move."""
    facts = (pair.path_a, pair.path_b, pair.prompt)
    return sha256("\0".join(facts).encode()).hexdigest()[:16]


def add_record(records, record):
    given = records.setdefault(record["question"], {})
    given.pop(record["dimension"], None)
    if record["label"] in LABELS:  # else it was taken back
        given[record["dimension"]] = record


def read_journal(path):
    """{question: {dimension: record}}, in the order of the answers. A line that is no record was
    cut off by a crash, before the page was told that it was saved."""
    records = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            add_record(records, json.loads(line))
    return records


def labels_of(path):
    """{identity: labels, None where there is none} of a CSV."""
    return {identity(row): row.label for row in read_pairs(path, unlabelled=True)}


# ---------------------------------------------------------------------------------------------
# Agreement


def agreement(label, other):
    """Share of equal labels (N,) among those valid in both, and Cohen's kappa: 1 for equal labels,
    0 for independent ones. nan where they are not defined."""
    valid = (label != INVALID) & (other != INVALID)
    label, other = label[valid], other[valid]
    equal = (label == other).float().mean()
    chance = sum((label == k).float().mean() * (other == k).float().mean() for k in (1, 0, -1))
    return equal.item(), ((equal - chance) / (1 - chance)).item()


def share(hits):
    return sum(hits) / len(hits) if hits else math.nan


def seconds_a_pair(records):
    """Median over the answered questions of a journal; 0 without any."""
    answered = [given.values() for given in records.values() if len(given) == 3]
    return median(max(r["seconds"] for r in given) for given in answered) if answered else 0.0


def toy_judges(rows, csv_path):
    """{judge: labels (N, 3)} of toy pairs by their pixels; {} where a prompt is not the toy's."""
    try:
        attributes = world.prompt_attributes([row.prompt for row in rows])
    except ValueError:
        return {}
    reward, words = load_reward(WEIGHTS / "reward.pt")
    pairs = disk_pairs(rows, csv_path, reward.config, Vocabulary(words), CACHE)
    annotated = annotate_pairs(pairs, attributes, seed=0)
    a, b = annotated.truth.unbind(1)
    difference = (a - b) / world.TRUE_STD
    oracle = torch.sign(difference).long() * (difference.abs() > world.TIE_BELOW)
    a, b = pair_scores(reward, pairs, "cpu").unbind(1)
    a_wins, b_wins, tie = btt_probabilities(a - b)
    learned = torch.stack((b_wins, tie, a_wins)).argmax(0) - 1
    return {"oracle": oracle, "toy annotators": annotated.label, "VideoReward": learned}


def report(path, others):
    """Lines on the labels of a CSV and its journal, beside other CSV files and the toy's judges."""
    rows = [row for row in read_pairs(path, unlabelled=True) if None not in row.label]
    if not rows:
        raise BadInput(f"{path}: no pair has all its labels yet")
    records = read_journal(path.with_suffix(".jsonl"))
    label = torch.tensor([row.label for row in rows])
    judges = {}
    for other in others:
        theirs = labels_of(other)
        found = [theirs.get(identity(row), NOTHING) for row in rows]
        found = [[INVALID if value is None else value for value in three] for three in found]
        judges[other.name] = torch.tensor(found)
    judges |= toy_judges(rows, path)
    columns = []
    for i, dimension in enumerate(DIMENSIONS):
        given = {name: record[dimension] for name, record in records.items() if dimension in record}
        seen = [record["seen"] for record in given.values()]
        left = [side == "left" for side in seen if side in ("left", "right")]
        twice = [(given[name], given[name + AGAIN]) for name in given if name + AGAIN in given]
        column = {
            "asked again, the same": share([a["label"] == b["label"] for a, b in twice]),
            "left, of left and right": share(left),
            "same": share([side == "same" for side in seen]),
        }
        for judge, other in judges.items():
            equal, kappa = agreement(label[:, i], other[:, i])
            column |= {f"{judge}, equal": equal, f"{judge}, kappa": kappa}
        columns.append(column)
    lines = [f"{path.name}: {len(rows)} pairs, {seconds_a_pair(records):.1f} seconds a pair", ""]
    width = max(map(len, columns[0]))
    lines.append(" " * width + "".join(f"{dimension:>7}" for dimension in DIMENSIONS))
    for name in columns[0]:
        values = ["-" if math.isnan(column[name]) else f"{column[name]:.2f}" for column in columns]
        lines.append(f"{name:{width}}" + "".join(f"{value:>7}" for value in values))
    return lines


def merge(path, files, reviewer, out):
    """Writes the pairs of a CSV with the labels that all `files` give, else the reviewer's, if any
    (paper, section 3.1). -> a line that says how many pairs lack a label."""
    people = [labels_of(file) for file in files]
    decided = labels_of(reviewer) if reviewer else {}
    rows = []
    for row in read_pairs(path, unlabelled=True):
        votes = [labels.get(identity(row), NOTHING) for labels in people]
        label = list(decided.get(identity(row), NOTHING))
        for i, of_dimension in enumerate(zip(*votes)):
            if len(set(of_dimension)) == 1:
                label[i] = of_dimension[0]
        rows.append(replace(row, label=tuple(label)))
    write_pairs(rows, out)
    left = sum(None in row.label for row in rows)
    return f"wrote {out}: {len(rows)} pairs, {left} of them with a label left to a reviewer"

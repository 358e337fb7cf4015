"""Labels of several people as one, and how far labels agree: with second answers, with other
people's, and on the toy with oracle, annotators and VideoReward."""

import json
from contextlib import suppress
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
from runtime.cli import BadInput
from settings import Data

CACHE = Path("out/clips")  # of decoded clips
AGAIN = "-2"  # ends the name of a question that is a pair's second
NO_LABEL = (None, None, None)


def identity(pair):
    """A pair's name, which tells nothing of its files and stays when rows move."""
    return sha256("\0".join((*pair.paths, pair.prompt)).encode()).hexdigest()[:16]


def read_journal(csv):
    """{(question, dimension): the last record}, the latest at the end. A record with the label ""
    takes an answer back."""
    records, path = {}, csv.with_suffix(".jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):  # cut off by a crash, before the page was told that it is saved
            record = json.loads(line)
            key = record["question"], record["dimension"]
            records.pop(key, None)
            records[key] = record
    return records


def label_of(records, question):
    """The answers for VQ, MQ and TA, None where there is none."""
    answers = [records.get((question, d), {}).get("label") for d in DIMENSIONS]
    return tuple(LABELS.get(answer) for answer in answers)


def labels_of(csv):
    """{identity of a pair: its label} of a CSV."""
    return {identity(row): row.label for row in read_pairs(csv, unlabelled=True)}


def merge(csv, files, out):
    """Writes the pairs of a CSV with the labels that all `files` agree on, else with its own, which
    are a reviewer's (paper, section 3.1). -> a line that says how many pairs lack a label."""
    rows, people = read_pairs(csv, unlabelled=True), [labels_of(file) for file in files]
    for i, row in enumerate(rows):
        label = list(row.label)
        votes = zip(*(labels.get(identity(row), NO_LABEL) for labels in people))
        for k, (first, *others) in enumerate(votes):
            if first is not None and all(vote == first for vote in others):
                label[k] = first
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


def report(csv, others):
    """Lines on the labels of a CSV and the answers behind them, beside other CSV files and the
    toy's judges."""
    rows = [row for row in read_pairs(csv, unlabelled=True) if None not in row.label]
    if not rows:
        raise BadInput(f"{csv}: no pair has all its labels yet")
    records, table = read_journal(csv), {}
    for side in ("left", "right", "same"):
        table[side] = [share_of(side, records, dimension) for dimension in DIMENSIONS]
    again = [label_of(records, identity(row) + AGAIN) for row in rows]
    judges = {"asked again": again} | toy_judges(rows, csv)
    for other in others:
        labels = labels_of(other)
        judges[other.name] = [labels.get(identity(row), NO_LABEL) for row in rows]
    label = torch.tensor([row.label for row in rows])
    for name, labels in judges.items():
        other = torch.tensor([[INVALID if x is None else x for x in three] for three in labels])
        columns = [agreement(label[:, i], other[:, i]) for i in range(len(DIMENSIONS))]
        table[f"{name}, equal"], table[f"{name}, kappa"] = zip(*columns)
    lines = [f"{csv.name}: {len(rows)} pairs, {seconds_a_pair(records):.1f} seconds a pair"]
    lines.append(f"{'':26}" + "".join(f"{dimension:>7}" for dimension in DIMENSIONS))
    for name, values in table.items():
        lines.append(f"{name:26}" + "".join(f"{value:7.2f}" for value in values))
    return lines


def share_of(side, records, dimension):
    seen = [record["seen"] for (_, d), record in records.items() if d == dimension]
    return seen.count(side) / max(1, len(seen))


def seconds_a_pair(records):
    """Median over the questions, 0 without any."""
    seconds = [record["seconds"] for (_, d), record in records.items() if d == "TA"]
    return median(seconds) if seconds else 0.0

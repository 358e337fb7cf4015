"""Compare two clips by eye: labels for the pairs of a CSV, in a browser (paper, section 3.1).

    python -m pages.label pairs.csv                     fills the empty labels of pairs.csv
    python -m pages.label pairs.csv --out ann.csv       the same for a copy without labels
    python -m pages.label ann.csv --report bob.csv      how far two people agree
    python -m pages.label pairs.csv --merge ann.csv bob.csv cy.csv --out all.csv

A question is a pair. A tenth of them is asked again later, sides swapped, as "...-2". An answer
belongs to a pair's files and prompt, not to its row, so that rows may move while somebody labels.
"""

import fcntl
import json
import math
import os
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from data import DIMENSIONS
from flags import Parser, seed
from pages.agreement import AGAIN, NO_LABEL, identity, label_of, merge, report, seconds_a_pair
from pages.server import Server
from real_data.pairs_csv import read_pairs, write_pairs
from runtime.cli import BadInput, run

SIDES = ("left", "right", "same", "invalid")


class Labelling:
    """The page's calls. Answers go to a journal, NAME.jsonl, and from there to the CSV."""

    def __init__(self, csv, seed=0):
        self.csv, self.seed, self.modified = csv, seed, None
        self.records = read_journal(csv)
        self.journal = open(csv.with_suffix(".jsonl"), "ab", buffering=0)
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise BadInput(f"{self.journal.name}: another pages.label writes there") from None
        if not self.questions():
            raise BadInput(f"{csv}: has no empty label; --out names a copy for your own labels")
        self.write_csv()  # the last process may have died before it could

    def read_csv(self):
        """The rows of the CSV, which other programs may change."""
        modified = self.csv.stat().st_mtime_ns
        if modified != self.modified:
            self.rows, self.modified = read_pairs(self.csv, unlabelled=True), modified
        return self.rows

    def write_csv(self):
        rows = self.read_csv()
        for i, row in enumerate(rows):
            if identity(row) in self.records:
                rows[i] = replace(row, label=label_of(self.records[identity(row)]))
        write_pairs(rows, self.csv)
        self.modified = self.csv.stat().st_mtime_ns

    def questions(self):
        """{name: pair} in order: the pairs with an empty label, and a tenth of them again later."""
        rows = {identity(row): row for row in self.read_csv()}
        names = [k for k, row in rows.items() if None in row.label or k in self.records]
        places = {name: place for place, name in enumerate(names)}
        for name in sorted(names, key=self.draw)[: math.ceil(len(names) / 10)]:
            places[name + AGAIN] = places[name] + len(names) / 3
        return {name: rows[name.removesuffix(AGAIN)] for name in sorted(places, key=places.get)}

    def draw(self, name):
        return sha256(f"{self.seed} {self.csv.name} {name}".encode()).digest()

    def pair(self, settings):
        pair = self.questions().get(settings["question"])
        if pair is None:
            raise ValueError("this pair is not in the CSV any more")
        return pair

    def state(self, settings):
        """What the page shows: the first open question."""
        questions = self.questions()
        open_names = [k for k in questions if len(self.records.get(k, {})) < len(DIMENSIONS)]
        count, num_open, seconds = len(questions), len(open_names), seconds_a_pair(self.records)
        progress = f"{num_open} of {count} left, {seconds:.1f} seconds a pair"
        state = {"count": count, "open": num_open, "progress": progress}
        if open_names:
            name, pair = open_names[0], questions[open_names[0]]
            first = name.removesuffix(AGAIN)
            a_is_left = self.draw(first)[-1] % 2 == (name == first)
            answers = {d: record["label"] for d, record in self.records.get(name, {}).items()}
            state |= {"id": name, "left": "A" if a_is_left else "B", "answers": answers}
            state |= {"prompt": pair.prompt, "fps": max(pair.fps_a, pair.fps_b)}
        return state

    def clip(self, settings):
        path = self.pair(settings).paths[settings["clip"] == "B"]
        return (self.csv.parent / path).read_bytes()

    def answer(self, settings):
        """Saves an answer for a dimension or, if that is empty, for the first that has none; `seen`
        is the side of the better clip, `seconds` how long the pair has been on the screen."""
        self.pair(settings)
        record = {name: settings[name] for name in ("question", "dimension", "label", "seen")}
        record["seconds"] = float(settings["seconds"])
        answers = self.records.get(record["question"], {})
        if not record["dimension"]:
            record["dimension"] = next((d for d in DIMENSIONS if d not in answers), "TA")
        if record["dimension"] in answers:
            raise ValueError("answered already, perhaps in another tab")
        valid = record["label"] in ("A", "B", "same", "invalid") and record["seen"] in SIDES
        if record["dimension"] not in DIMENSIONS or not valid:
            raise ValueError("an answer has a dimension, a label and the side seen")
        return self.save(record)

    def undo(self, settings):
        """Takes back the last answer."""
        for question in reversed(self.records):
            for dimension in reversed(self.records[question]):
                return self.save({"question": question, "dimension": dimension, "label": None})
        return self.state(settings)

    def save(self, record):
        """Puts a record on the disk, into the journal, then into the CSV."""
        self.journal.write(b"\n" + json.dumps(record).encode())  # a line may have been cut off
        os.fsync(self.journal.fileno())
        add_record(self.records, record)
        self.write_csv()
        return self.state(record)

    def report(self, settings):
        return {"lines": report(self.csv, self.records, [])}


def add_record(records, record):
    """Adds an answer to {question: {dimension: record}}, at the end; label None takes one back."""
    answers = records.pop(record["question"], {})
    answers.pop(record["dimension"], None)
    if record["label"]:
        answers[record["dimension"]] = record
    records[record["question"]] = answers


def read_journal(csv):
    records, path = {}, csv.with_suffix(".jsonl")
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):  # cut off by a crash, before the page was told that it is saved
            add_record(records, json.loads(line))
    return records


def main():
    parser = Parser("Compare two clips by eye: labels for the pairs of a CSV, in a browser.")
    add = parser.add_argument
    add("csv", type=Path, metavar="CSV", help="pairs in the public format, labelled or not")
    add("--out", type=Path, metavar="CSV", help="a copy to write to, beside CSV (default: CSV)")
    add("--seed", type=seed, default=0, help="of the sides, and of the tenth that is asked again")
    add("--report", type=Path, nargs="*", metavar="CSV", help="print agreement, also with these")
    add("--merge", type=Path, nargs="+", metavar="CSV", help="write labels that all these agree on")
    args = parser.parse_args()
    out = args.out or args.csv
    if args.merge:
        return print(merge(args.csv, args.merge, out))
    if args.report is not None:
        return print("\n".join(report(args.csv, read_journal(args.csv), args.report)))
    if not out.exists():
        rows = read_pairs(args.csv, unlabelled=True)
        write_pairs([replace(row, label=NO_LABEL) for row in rows], out)
    page = Labelling(out, args.seed)
    print(f"labels go to {out}; the sides are shuffled by --seed {args.seed}")
    calls = [page.state, page.clip, page.answer, page.undo, page.report]
    Server("label.html", calls).serve_forever()


if __name__ == "__main__":
    run(main)

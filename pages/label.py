"""Compare two clips by eye: labels for the pairs of a CSV, in a browser (paper, section 3.1).

    python -m pages.label pairs.csv                     fills the empty labels of pairs.csv
    python -m pages.label pairs.csv --out ann.csv       the same for a copy without labels
    python -m pages.label ann.csv --report bob.csv
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
from pages.agreement import AGAIN, NO_LABEL, identity, label_of, merge, report, seconds_a_pair
from pages.server import Server
from real_data.pairs_csv import read_pairs, write_pairs
from runtime.cli import BadInput, Parser, run, seed

SIDES = ("left", "right", "same", "invalid")


class Labelling:
    """The page's calls. Answers go to a journal, NAME.jsonl, and from there to the CSV."""

    def __init__(self, csv, seed=0):
        self.csv, self.salt, self.modified = csv, f"{seed} {csv.name}", None
        self.records = read_journal(csv)
        self.journal = open(csv.with_suffix(".jsonl"), "ab", buffering=0)
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise BadInput(f"{self.journal.name}: another pages.label writes there") from None
        if not self.questions():
            raise BadInput(f"{csv}: has no empty label; --out names a copy for your own labels")
        self.write_csv()  # the last process may have died before it could

    def calls(self):
        calls = (self.state, self.clip, self.answer, self.undo, self.report)
        return {call.__name__: call for call in calls}

    def read_csv(self):
        modified = self.csv.stat().st_mtime_ns
        if modified != self.modified:
            self.rows = read_pairs(self.csv, unlabelled=True)
            self.pairs = {identity(row): row for row in self.rows}
            self.modified = modified

    def write_csv(self):
        for i, row in enumerate(self.rows):
            if identity(row) in self.records:
                self.rows[i] = replace(row, label=label_of(self.records[identity(row)]))
        write_pairs(self.rows, self.csv)
        self.modified = self.csv.stat().st_mtime_ns

    def questions(self):
        """Names in order: the pairs with an empty label, and a tenth of them again later."""
        self.read_csv()
        names = [k for k, row in self.pairs.items() if None in row.label or k in self.records]
        places = {name: place for place, name in enumerate(names)}
        for name in sorted(names, key=self.draw)[: math.ceil(len(names) / 10)]:
            places[name + AGAIN] = places[name] + len(names) / 3
        return sorted(places, key=places.get)

    def draw(self, name):
        return sha256(f"{self.salt} {name}".encode()).digest()

    def state(self, data):
        """What the page shows: the first open question."""
        names = self.questions()
        open_names = [name for name in names if len(self.records.get(name, {})) < len(DIMENSIONS)]
        state = {"file": self.csv.name, "count": len(names), "open": len(open_names)}
        state["seconds"] = seconds_a_pair(self.records)
        if open_names:
            name = open_names[0]
            first = name.removesuffix(AGAIN)
            pair, a_is_left = self.pairs[first], self.draw(first)[-1] % 2 == (name == first)
            answers = self.records.get(name, {})
            state["answers"] = {d: record["label"] for d, record in answers.items()}
            state |= {"id": name, "prompt": pair.prompt, "fps": max(pair.fps_a, pair.fps_b)}
            state["left"] = "A" if a_is_left else "B"
        return state

    def pair(self, data):
        self.read_csv()
        pair = self.pairs.get(str(data.get("question")).removesuffix(AGAIN))
        if pair is None:
            raise ValueError("this pair is not in the CSV any more")
        return pair

    def clip(self, data):
        path = self.pair(data).paths[data.get("clip") == "B"]
        return (self.csv.parent / path).read_bytes()

    def answer(self, data):
        """Saves an answer; `seen` is the side where it was seen, `seconds` for how long."""
        self.pair(data)
        valid = data.get("dimension") in DIMENSIONS and data.get("label") in ("A", "B", *SIDES[2:])
        if (
            not valid
            or data.get("seen") not in SIDES
            or not isinstance(data.get("seconds"), float | int)
        ):
            raise ValueError("an answer has a dimension, a label, the side seen, and seconds")
        if data["dimension"] in self.records.get(data["question"], {}):
            raise ValueError("answered already, perhaps in another tab; Backspace takes it back")
        return self.save(data)

    def undo(self, data):
        """Takes back the last answer."""
        answered = [name for name in self.records if self.records[name]]
        if not answered:
            return self.state(data)
        dimension = list(self.records[answered[-1]])[-1]
        return self.save({"question": answered[-1], "dimension": dimension, "label": None})

    def save(self, record):
        """Puts a record on the disk, into the journal, then into the CSV."""
        self.journal.write(b"\n" + json.dumps(record).encode())  # a line may have been cut off
        os.fsync(self.journal.fileno())
        add_record(self.records, record)
        self.write_csv()
        return self.state(record)

    def report(self, data):
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
    add("--out", type=Path, metavar="CSV", help="copy to label or file to merge to, beside CSV")
    add("--seed", type=seed, default=0, help="of the sides, and of the tenth that is asked again")
    add("--report", type=Path, nargs="*", metavar="CSV", help="print agreement, also with these")
    add("--merge", type=Path, nargs="+", metavar="CSV", help="write to --out what these agree on")
    add("--reviewer", type=Path, metavar="CSV", help="decides where those of --merge disagree")
    args = parser.parse_args()
    out = args.out or args.csv
    if out.resolve().parent != args.csv.resolve().parent:
        raise BadInput(f"--out: must lie beside {args.csv}, as the paths in it are relative")
    if args.merge:
        print(merge(args.csv, args.merge, args.reviewer, out))
    elif args.report is not None:
        print("\n".join(report(args.csv, read_journal(args.csv), args.report)))
    else:
        if not out.exists():
            rows = read_pairs(args.csv, unlabelled=True)
            write_pairs([replace(row, label=NO_LABEL) for row in rows], out)
        calls = Labelling(out, args.seed).calls()
        print(f"labels go to {out}; the sides are shuffled by --seed {args.seed}")
        Server("label.html", calls).serve_forever()


if __name__ == "__main__":
    run(main)

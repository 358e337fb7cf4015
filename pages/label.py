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
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Lock

from data import DIMENSIONS
from pages.agreement import (
    AGAIN,
    NO_LABEL,
    add_record,
    identity,
    label_of,
    merge,
    read_journal,
    report,
    seconds_a_pair,
)
from pages.server import Server
from real_data.pairs_csv import read_pairs, write_pairs
from runtime.cli import BadInput, Parser, run, seed


class Labelling:
    """The page's calls. Answers go to a journal, NAME.jsonl, and from there to the CSV."""

    def __init__(self, csv, seed):
        self.csv, self.salt = csv, f"{seed} {csv.name}"
        self.lock, self.modified = Lock(), None
        path = csv.with_suffix(".jsonl")
        self.journal = open(path, "ab", buffering=0)
        try:
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise BadInput(f"{path}: another pages.label writes there") from None
        self.records = read_journal(path)
        self.read_csv()
        if not self.questions():
            raise BadInput(f"{csv}: has no empty label; --out names a copy for your own labels")
        self.write_csv()  # the last process may have died before it could

    def calls(self):
        names = ("state", "clip", "answer", "undo", "report")
        return {name: partial(self.in_turn, getattr(self, name)) for name in names}

    def in_turn(self, call, data):
        """One call at a time, each on the CSV as it is now."""
        with self.lock:
            if self.csv.stat().st_mtime_ns != self.modified:
                self.read_csv()
            return call(data)

    def read_csv(self):
        modified = self.csv.stat().st_mtime_ns
        self.rows = read_pairs(self.csv, unlabelled=True)
        self.pairs = {identity(row): row for row in self.rows}
        self.modified = modified

    def write_csv(self):
        for i, row in enumerate(self.rows):
            answers = self.records.get(identity(row))
            if answers is not None:
                self.rows[i] = replace(row, label=label_of(answers))
        write_pairs(self.rows, self.csv)
        self.modified = self.csv.stat().st_mtime_ns

    def questions(self):
        """Names in order: the pairs with an empty label, and a tenth of them again later."""
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
        if not open_names:
            return state
        name = open_names[0]
        first = name.removesuffix(AGAIN)
        pair, a_is_left = self.pairs[first], self.draw(first)[-1] % 2 == (name == first)
        state |= {"id": name, "left": "A" if a_is_left else "B", "prompt": pair.prompt}
        state["answers"] = {d: record["label"] for d, record in self.records.get(name, {}).items()}
        return state | {"fps": max(pair.fps_a, pair.fps_b)}

    def pair(self, data):
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
        valid = data.get("dimension") in DIMENSIONS
        valid = valid and data.get("label") in ("A", "B", "same", "invalid")
        valid = valid and data.get("seen") in ("left", "right", "same", "invalid")
        if not valid or not isinstance(data.get("seconds"), float | int):
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
        return self.state({})

    def report(self, data):
        return {"lines": report(self.csv, [])}


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
        print("\n".join(report(args.csv, args.report)))
    else:
        if not out.exists():
            rows = read_pairs(args.csv, unlabelled=True)
            write_pairs([replace(row, label=NO_LABEL) for row in rows], out)
        print(f"labels go to {out}; the sides are shuffled by --seed {args.seed}")
        Server("label.html", Labelling(out, args.seed).calls()).serve_forever()


if __name__ == "__main__":
    run(main)

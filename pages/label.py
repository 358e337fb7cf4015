"""Compare two clips by eye: labels for the pairs of a CSV, in a browser (paper, section 3.1).

    python -m pages.label pairs.csv                     fills the empty labels of pairs.csv
    python -m pages.label pairs.csv --out ann.csv       the same for a copy without labels
    python -m pages.label ann.csv --report bob.csv      how far two people agree
    python -m pages.label pairs.csv --merge ann.csv bob.csv cy.csv --out all.csv

A question is a pair. A tenth of them is asked again later, sides swapped, as "...-2". An answer
belongs to a pair's files and prompt, not to its row, so that rows may move while somebody labels.
"""

import json
import math
import os
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from data import DIMENSIONS
from flags import Parser, seed
from pages import agreement
from pages.agreement import AGAIN, NO_LABEL, identity, label_of, read_journal
from pages.server import Server
from real_data.pairs_csv import LABELS, NAMES, read_pairs, write_pairs
from runtime.cli import BadInput, run

SIDES = ("left", "right", "same", "invalid")


class Labelling:
    """The page's calls. Each reads the CSV and the journal, as other programs may write there."""

    def __init__(self, csv, seed=0):
        self.csv, self.seed = csv, seed
        if not self.questions():
            raise BadInput(f"{csv}: has no empty label; --out names a copy for your own labels")
        self.write_csv()  # the last process may have died before it could

    def read_csv(self):
        return rows_of(self.csv, self.csv.stat().st_mtime_ns)

    def questions(self):
        """{name: pair} in order: the pairs with an empty label, and a tenth of them again later."""
        rows = {identity(row): row for row in self.read_csv()}
        answered = {question for question, _ in read_journal(self.csv)}
        names = [k for k, row in rows.items() if None in row.label or k in answered]
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
        questions, records = self.questions(), read_journal(self.csv)
        open_names = [name for name in questions if None in label_of(records, name)]
        seconds = agreement.seconds_a_pair(records)
        state = {"count": len(questions), "open": len(open_names)}
        state["progress"] = f"{state['open']} of {state['count']} left, {seconds:.1f} s a pair"
        if open_names:
            name = open_names[0]
            pair, label = questions[name], label_of(records, name)
            is_first = not name.endswith(AGAIN)
            a_is_left = self.draw(name.removesuffix(AGAIN))[-1] % 2 == is_first
            state |= {"id": name, "left": "A" if a_is_left else "B", "prompt": pair.prompt}
            state["answers"] = {d: NAMES[value] for d, value in zip(DIMENSIONS, label)}
            state["fps"] = max(pair.fps_a, pair.fps_b)
        return state

    def clip(self, settings):
        path = self.pair(settings).paths[settings["clip"] == "B"]
        return (self.csv.parent / path).read_bytes()

    def answer(self, settings):
        """Saves an answer: `seen` is the side of the better clip, `seconds` how long the pair has
        been on the screen."""
        self.pair(settings)
        record = {name: settings[name] for name in ("question", "dimension", "label", "seen")}
        record["seconds"] = float(settings["seconds"])
        dimension, known = record["dimension"], record["label"] in LABELS
        if dimension not in DIMENSIONS or not known or record["seen"] not in SIDES:
            raise ValueError("an answer has a dimension, a label and the side seen")
        before = label_of(read_journal(self.csv), record["question"])
        if before[DIMENSIONS.index(dimension)] is not None:
            raise ValueError("answered already, perhaps in another tab")
        return self.save(record)

    def undo(self, settings):
        """Takes back the last answer."""
        answered = [record for record in read_journal(self.csv).values() if record["label"]]
        return self.save(answered[-1] | {"label": ""}) if answered else self.state(settings)

    def save(self, record):
        """Puts a record on the disk, into the journal, then into the CSV."""
        with open(self.csv.with_suffix(".jsonl"), "ab") as journal:
            journal.write(b"\n" + json.dumps(record).encode())  # a line may have been cut off
            journal.flush()
            os.fsync(journal.fileno())
        self.write_csv()
        return self.state(record)

    def write_csv(self):
        rows, records = [*self.read_csv()], read_journal(self.csv)
        answered = {question for question, _ in records}
        for i, row in enumerate(rows):
            if identity(row) in answered:
                rows[i] = replace(row, label=label_of(records, identity(row)))
        write_pairs(rows, self.csv)

    def report(self, settings):
        return {"lines": agreement.report(self.csv, [])}


@lru_cache(1)
def rows_of(csv, modified):
    """The rows of a CSV, read again when its time of modification changes."""
    return read_pairs(csv, unlabelled=True)


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
        return print(agreement.merge(args.csv, args.merge, out))
    if args.report is not None:
        return print("\n".join(agreement.report(args.csv, args.report)))
    if not out.exists():
        rows = read_pairs(args.csv, unlabelled=True)
        write_pairs([replace(row, label=NO_LABEL) for row in rows], out)
    page = Labelling(out, args.seed)
    print(f"labels go to {out}; the sides are shuffled by --seed {args.seed}")
    calls = [page.state, page.clip, page.answer, page.undo, page.report]
    Server("label.html", calls).serve_forever()


if __name__ == "__main__":
    run(main)

"""Compare two clips by eye: labels for the pairs of a CSV, in a browser (paper, section 3.1).

    python -m pages.label pairs.csv                     fills the empty labels of pairs.csv
    python -m pages.label pairs.csv --out ann.csv       writes them to ann.csv, beside it
    python -m pages.label pairs.csv --out ann.csv --report bob.csv
    python -m pages.label pairs.csv --merge ann.csv bob.csv cy.csv --out all.csv

A question is a pair. A tenth of them is asked again later, sides swapped, as "...-2". An answer
belongs to a pair's files and prompt, not to its row, so that rows may move while somebody labels.
"""

import fcntl
import json
import math
import os
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Lock

from data import DIMENSIONS
from pages import agreement
from pages.agreement import AGAIN, NOTHING, add_record, identity
from pages.server import Refused, Server
from real_data.pairs_csv import LABELS, read_pairs, write_pairs
from runtime.cli import BadInput, Parser, run, seed, whole

OTHER = {"left": "right", "right": "left"}


class Labelling:
    """The page's calls, over a journal that loses nothing and the CSV that is written from it."""

    def __init__(self, csv, out, seed):
        self.csv, self.out, self.salt = csv, out, f"{seed} {out.name}"
        self.in_place = out.resolve() == csv.resolve()
        self.lock, self.stamp = Lock(), None
        self.shown = {}  # {question: when it was first on the page}
        self.read_csv()
        path = out.with_suffix(".jsonl")
        try:
            self.journal = open(path, "ab", buffering=0)
            fcntl.flock(self.journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
        except BlockingIOError:
            raise BadInput(f"{path}: another pages.label writes there") from None
        self.records = agreement.read_journal(path)
        if self.records:
            self.write_csv()  # the last process may have died before it could
        elif self.in_place and not any(None in row.label for row in self.rows):
            raise BadInput(f"{csv}: has no empty label; --out names a file for your own")
        elif not self.in_place and out.exists():
            raise BadInput(f"{out}: is there without its journal {path.name}; name a new file")

    def calls(self):
        calls = {"GET question": self.state, "GET clip": self.clip, "GET report": self.report}
        calls |= {"POST answer": self.answer, "POST undo": self.undo}
        return {name: self.in_turn(call) for name, call in calls.items()}

    def in_turn(self, call):
        """One call at a time, each on the CSV as it is now."""

        def alone(data):
            with self.lock:
                self.read_csv()
                return call(data)

        return alone

    def read_csv(self):
        stamp = self.csv.exists() and self.csv.stat().st_mtime_ns
        if stamp != self.stamp:
            self.rows = read_pairs(self.csv, unlabelled=True)
            self.pairs = {identity(row): row for row in self.rows}
            self.stamp = stamp

    def questions(self):
        """Names in order: pairs with an empty label, else all; a tenth comes again later."""
        mine = self.records if self.in_place else {}
        empty = [name for name, pair in self.pairs.items() if None in pair.label or name in mine]
        asked = empty or list(self.pairs)
        shuffled = sorted(asked, key=lambda name: self.draw("again", name))
        places = {name: place for place, name in enumerate(asked)}
        for name in shuffled[: math.ceil(len(asked) / 10)]:
            places[name + AGAIN] = places[name] + len(asked) / 3
        return sorted(places, key=places.get)

    def draw(self, *what):
        return int(sha256(" ".join((self.salt, *what)).encode()).hexdigest(), 16)

    def asked(self, data):
        """The question of a request, its pair, and {answer on the page: label in the CSV}."""
        name = data.get("question")
        if name not in self.questions():
            raise Refused(404, "this pair is not in the CSV any more")
        first = name.removesuffix(AGAIN)
        left, right = "AB" if (self.draw("left", first) % 2 == 1) == (name == first) else "BA"
        labels = {"left": left, "same": "same", "right": right, "invalid": "invalid"}
        return name, self.pairs[first], labels

    def state(self, data):
        """What the page shows: a question, or the first open one where that is answered."""
        names = self.questions()
        left = [name for name in names if len(self.records.get(name, {})) < 3]
        state = {"open": len(left), "count": len(names), "file": self.out.name}
        state["seconds"] = agreement.seconds_a_pair(self.records)
        if not left:
            return state
        name = data.get("question") if data.get("question") in left else left[0]
        _, pair, labels = self.asked({"question": name})
        sides = {label: side for side, label in labels.items()}
        given = self.records.get(name, {})
        self.shown.setdefault(name, time.monotonic())
        state |= {"id": name, "prompt": pair.prompt, "fps": max(pair.fps_a, pair.fps_b)}
        return state | {"answers": {key: sides[given[key]["label"]] for key in given}}

    def clip(self, data):
        _, pair, labels = self.asked(data)
        side = str(data.get("side"))
        if side not in OTHER:
            raise Refused(400, "side must be left or right")
        return self.csv.parent / pair.paths["AB".index(labels[side])]

    def report(self, data):
        return {"lines": agreement.report(self.out, [])}

    def answer(self, data):
        name, _, labels = self.asked(data)
        dimension, seen = data.get("dimension"), str(data.get("side"))
        if dimension not in DIMENSIONS or seen not in labels:
            raise Refused(400, "dimension and side must be those of an answer")
        if dimension in self.records.get(name, {}):
            raise Refused(409, "answered already, perhaps in another tab; Backspace takes it back")
        side = OTHER.get(seen, seen) if data.get("swapped") else seen
        seconds = round(time.monotonic() - self.shown.get(name, time.monotonic()), 1)
        self.save(name, dimension, label=labels[side], seen=seen, seconds=seconds)
        return self.state(data)

    def undo(self, data):
        """Takes back the last answer of a question, or of the nearest before it."""
        names = self.questions()
        if data.get("question") in names:
            names = names[: names.index(data["question"]) + 1]
        answered = [name for name in names if self.records.get(name)]
        if not answered:
            return self.state(data)
        *_, dimension = self.records[answered[-1]]
        self.save(answered[-1], dimension, label=None)
        return self.state({"question": answered[-1]})

    def save(self, question, dimension, **answer):
        """Puts an answer on the disk, in the journal, then in the CSV; label None takes it back."""
        record = {"question": question, "dimension": dimension, **answer}
        line = json.dumps(record).encode()
        self.journal.write(b"\n" + line)  # the line feed ends a line that was cut off
        os.fsync(self.journal.fileno())
        add_record(self.records, record)
        self.write_csv()

    def write_csv(self):
        rows = []
        for row in self.rows:
            label = row.label if self.in_place else NOTHING
            given = self.records.get(identity(row))
            if given is not None:
                label = (LABELS[given[d]["label"]] if d in given else None for d in DIMENSIONS)
            rows.append(replace(row, label=tuple(label)))
        write_pairs(rows, self.out)


def main():
    parser = Parser("Compare two clips by eye: labels for the pairs of a CSV, in a browser.")
    add = parser.add_argument
    add("csv", type=Path, metavar="CSV", help="pairs in the public format, labelled or not")
    add("--out", type=Path, metavar="CSV", help="where labels go; default: the empty cells of CSV")
    add("--seed", type=seed, default=0, help="of the sides, and of the tenth that is asked again")
    add("--port", type=whole, default=0, help="of this machine alone; 0: any that is free")
    add("--report", type=Path, nargs="*", metavar="CSV", help="print agreement, also with these")
    add("--merge", type=Path, nargs="+", metavar="CSV", help="write to --out what these agree on")
    add("--reviewer", type=Path, metavar="CSV", help="decides where those of --merge disagree")
    args = parser.parse_args()
    out = args.out or args.csv
    if args.merge and not args.out:
        raise BadInput("--merge: needs --out, the file to write")
    if out.resolve().parent != args.csv.resolve().parent:
        raise BadInput(f"--out {out}: must lie beside {args.csv}, as the paths in it are relative")
    try:
        if args.merge:
            print(agreement.merge(args.csv, args.merge, args.reviewer, out))
        elif args.report is not None:
            print("\n".join(agreement.report(out, args.report)))
        else:
            labelling = Labelling(args.csv, out, args.seed)
            print(f"labels go to {out}; the sides are shuffled by --seed {args.seed}")
            Server("label.html", labelling.calls(), args.port).serve()
    except OSError as error:
        raise BadInput(f"{error.filename}: {error.strerror}") from None


if __name__ == "__main__":
    run(main)

"""Preference pairs as a CSV in VideoAlign's format (section 3.1).

    path_A, path_B          video files or latents (video.py), relative to the data folder
    prompt                  text
    VQ, MQ, TA              A, B, same (or tie) or invalid, in any case
    fps_A, num_frames_A, fps_B, num_frames_B    numbers; a video with fewer frames is refused
    MOS_A_VQ, MOS_A_MQ, ... MOS_B_TA            optional ratings from 1 to 5; empty or 0 for none

The data folder is the CSV's own or --data-dir. A path is judged as it is written: an absolute one,
or one with "..", must not leave the folder. Links are followed wherever they lead, as the Hugging
Face client stores a data set in links.

Commas, semicolons or tabs separate the columns. Their order is free, and other columns may stand
among them. Blank lines are ignored. Every fault is one line that names file, line and column.
"""

import csv
import io
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from data import DIMENSIONS, INVALID
from real_data.video import latent_file
from runtime.cli import BadInput

LABELS = {"A": 1, "B": -1, "same": 0, "tie": 0, "invalid": INVALID}  # in any case
NAMES = {1: "A", -1: "B", 0: "same", INVALID: "invalid", None: ""}
PATHS = ("path_A", "path_B")
NUMBERS = ("fps_A", "num_frames_A", "fps_B", "num_frames_B")
COLUMNS = (*PATHS, "prompt", *DIMENSIONS, *NUMBERS)
RATINGS = tuple(f"MOS_{side}_{name}" for side in "AB" for name in DIMENSIONS)
NO_PROMPT = ("nan", "none", "null")  # what programs write for an empty cell


class RowFault(BadInput):
    """A fault in a row of a CSV, by file, line and column."""

    def __init__(self, csv_path, line, column, text):
        super().__init__(f"{csv_path}, line {line}, column {column}: {text}")
        self.line = line


@dataclass(frozen=True)
class Pair:
    """One row. Labels are 1 (A is better), -1 (B), 0 (same), INVALID, or None for an empty cell."""

    path_a: str  # relative to the data folder, without ".."
    path_b: str
    prompt: str
    label: tuple  # VQ, MQ, TA
    fps_a: float
    frames_a: float
    fps_b: float
    frames_b: float
    mos: tuple = ()  # six ratings in the order of RATINGS, 0 for none; empty without these columns
    other: dict = field(default_factory=dict)  # text of the other columns
    line: int = field(default=0, compare=False)  # where the row begins in its file

    @property
    def paths(self):
        return self.path_a, self.path_b


def read_pairs(csv_path, skipped=None, folder=None, unlabelled=False):
    """The pairs of a CSV whose paths start from `folder`, by default its own. Videos are not read.

    BadInput for the first fault. With a list `skipped`, rows that have a fault are left out and
    their RowFaults appended to it. With `unlabelled`, a label may be empty."""
    csv_path = Path(csv_path)
    folder = Path(folder or csv_path.parent)
    text = _read_text(csv_path)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    pairs, last_line = [], 1
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(csv_path, header)
        for row in reader:
            line = last_line + 1  # a quoted prompt may span lines
            last_line = reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            try:
                pairs.append(_read_row(csv_path, line, header, row, folder, unlabelled))
            except RowFault as fault:
                if skipped is None:
                    raise
                skipped.append(fault)
    except csv.Error as error:
        raise BadInput(f"{csv_path}, line {reader.line_num}: not a CSV row ({error})") from None
    if not pairs:
        first = f"; the first fault: {skipped[0]}" if skipped else ""
        raise BadInput(f"{csv_path}: holds no pair{first}")
    return pairs


def _read_text(csv_path):
    try:
        content = csv_path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{csv_path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        text = f"byte {content[error.start]:#x} is not UTF-8; save the file as UTF-8"
        raise BadInput(f"{csv_path}, line {line}: {text}") from None


def _check_header(csv_path, header):
    missing = ", ".join(name for name in COLUMNS if name not in header)
    if missing:
        columns = ", ".join(COLUMNS)
        raise BadInput(f"{csv_path}: line 1 must name the columns {columns}; missing: {missing}")
    for name in header:
        if header.count(name) > 1:
            raise RowFault(csv_path, 1, name, "occurs twice")


def _read_row(csv_path, line, header, row, folder, unlabelled):
    if len(row) != len(header):
        last = header[min(len(row), len(header)) - 1]
        text = f"the row has {len(row)} fields, the header {len(header)}"
        raise RowFault(csv_path, line, last, text)
    cells = {name: cell.strip() for name, cell in zip(header, row)}

    def read(name, convert, *options):
        try:
            return convert(cells[name], *options)
        except ValueError as error:
            raise RowFault(csv_path, line, name, error) from None

    prompt = read("prompt", _prompt)
    path_a, path_b = (read(name, _path, folder) for name in PATHS)
    (file_a, index_a), (file_b, index_b) = latent_file(path_a), latent_file(path_b)
    if index_a == index_b and os.path.samefile(folder / file_a, folder / file_b):
        text = f"{path_b!r} is the clip of path_A; a pair is of two clips"
        raise RowFault(csv_path, line, "path_B", text)
    label = tuple(read(name, _label, unlabelled) for name in DIMENSIONS)
    numbers = [read(name, _number, 1e-3, 1e6) for name in NUMBERS]
    is_rated = set(RATINGS) <= set(header)
    mos = tuple(read(name, _rating) for name in RATINGS) if is_rated else ()
    other = {name: cell for name, cell in cells.items() if name not in COLUMNS + RATINGS}
    return Pair(path_a, path_b, prompt, label, *numbers, mos=mos, other=other, line=line)


def _prompt(text):
    if not any(letter.isalnum() for letter in text):
        raise ValueError(f"{text!r} has no words")
    if text.lower() in NO_PROMPT:
        raise ValueError(f"{text!r} stands for an empty cell; write the prompt")
    return text


def _path(text, folder):
    path = os.path.normpath(text)
    file = os.path.abspath(folder / latent_file(path)[0])
    if not Path(file).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"path {text!r} does not lie in the data folder {folder}")
    if not os.path.isfile(file):
        raise ValueError(f"no video {text!r} in {folder}")
    return path


def _label(text, unlabelled):
    if unlabelled and not text:
        return None
    for name, value in LABELS.items():
        if text.lower() == name.lower():
            return value
    raise ValueError(f"unknown label {text!r}; known: {', '.join(LABELS)}")


def _number(text, low, high):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise ValueError(f"{text!r} is no number from {low:g} to {high:g}")
    return value


def _rating(text):
    return 0.0 if text in ("", "0", "0.0") else _number(text, 1, 5)


def write_pairs(pairs, csv_path):
    """Writes pairs so that read_pairs gives them back."""
    rows = []
    for pair in pairs:
        labels = [NAMES[value] for value in pair.label]
        numbers = pair.fps_a, pair.frames_a, pair.fps_b, pair.frames_b
        row = dict(zip(COLUMNS, (*pair.paths, pair.prompt, *labels, *numbers)))
        rows.append(row | dict(zip(RATINGS, pair.mos)) | pair.other)
    header = dict.fromkeys(name for row in rows for name in row)
    temporary = Path(csv_path).with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(csv_path)

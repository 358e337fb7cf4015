"""Preference pairs on disk: the public CSV schema of VideoAlign, one row a pair, its videos beside it (section 3.1).

    path_A, path_B                              video files or latents (video.py), relative to the data folder
    prompt                                      text
    VQ, MQ, TA                                  A, B, same (or tie) or invalid, in any case
    fps_A, num_frames_A, fps_B, num_frames_B    numbers; the videos' own are used, and a video with fewer frames refused
    MOS_A_VQ, MOS_A_MQ, ... MOS_B_TA            optional: ratings from 1 to 5; empty or 0 where there is none
    A_model, B_model, Overall                   in benchmark files only

The data folder is the CSV's own or --data-dir. A path is judged as it is written: an absolute one,
or one with "..", must not leave the folder. Links are followed, wherever they lead: they were put
there by whoever owns the folder, as the Hugging Face client does.

Commas, semicolons or tabs separate the columns, whose order is free; blank lines are passed over.
Every fault in a file is a BadInput of one line that names file, line and column.
"""

import csv
import io
import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from data import DIMENSIONS, INVALID
from real_data.video import latent_file
from runtime.cli import BadInput

LABELS = {"A": 1, "B": -1, "same": 0, "tie": 0, "invalid": INVALID}  # read in any case
NAMES = {1: "A", -1: "B", 0: "same", INVALID: "invalid", None: ""}  # None: nobody has looked yet
PATHS = ("path_A", "path_B")
NUMBERS = ("fps_A", "num_frames_A", "fps_B", "num_frames_B")
COLUMNS = (*PATHS, "prompt", *DIMENSIONS, *NUMBERS)
RATINGS = tuple(f"MOS_{side}_{name}" for side in "AB" for name in DIMENSIONS)
MODELS = ("A_model", "B_model")
NO_PROMPT = ("nan", "none", "null")  # what programs write for an empty cell


@dataclass(frozen=True)
class Pair:
    """One row. Labels are 1 (A better), -1 (B), 0 (same) or INVALID."""

    path_a: str  # as written, relative to the data folder; without ".."
    path_b: str
    prompt: str
    label: tuple  # VQ, MQ, TA; None to write an empty cell
    fps_a: float
    frames_a: float
    fps_b: float
    frames_b: float
    mos: tuple = ()  # six ratings in the order of RATINGS, 0 where missing; empty without these columns
    models: tuple = ()  # of A and B; empty but in benchmarks
    overall: int = INVALID
    line: int = field(default=0, compare=False)  # where it stands in its file

    @property
    def paths(self):
        return self.path_a, self.path_b


def read_pairs(csv_path, skipped=None, folder=None, unlabelled=False):
    """The pairs of a CSV, whose paths start from `folder`, by default its own. BadInput names file, line and column of
    the first fault; with a list `skipped`, rows with a fault are left out and the fault's text is appended to it.
    With `unlabelled`, an empty label is no fault but None.
    Whether the videos can be decoded is seen later."""
    csv_path = Path(csv_path)
    try:
        content = csv_path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{csv_path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig").split("\n")
        try:
            header, field_number = (
                before[0].split(","),
                len(next(csv.reader([before[-1].strip("\r") + "?"]))),
            )
        except csv.Error:  # no row at all
            header, field_number = [""], 1
        where = (
            f"line {len(before)}, column {header[min(field_number, len(header)) - 1].strip() or 1}"
        )
        byte = content[error.start]
        raise BadInput(
            f"{csv_path}, {where}: byte {byte:#x} is not UTF-8; save the file as UTF-8"
        ) from None
    folder = Path(folder or csv_path.parent)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    pairs, line = [], 1
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(csv_path, header)
        for row in reader:
            line += 1
            try:
                if any(text.strip() for text in row):
                    pairs.append(_parse(csv_path, line, header, row, folder, unlabelled))
            except BadInput as fault:
                if skipped is None:
                    raise
                skipped.append(str(fault))
            line = reader.line_num  # a quoted prompt may span lines: a row is named by its first
    except csv.Error as error:
        raise BadInput(f"{csv_path}, line {reader.line_num}: not a CSV row ({error})") from None
    if not pairs:
        raise BadInput(
            f"{csv_path}: holds no pair" + (f"; the first fault: {skipped[0]}" if skipped else "")
        )
    return pairs


def _check_header(path, header):
    if not set(header) & set(COLUMNS):
        raise BadInput(f"{path}: has no header; line 1 must name the columns {', '.join(COLUMNS)}")
    for name in header:
        if header.count(name) > 1:
            raise BadInput(f"{path}, line 1, column {name}: stands there twice")
    for name in COLUMNS:
        if name not in header:
            raise BadInput(
                f"{path}, line 1, column {name}: is missing; needed: {', '.join(COLUMNS)}"
            )


def _parse(csv_path, line, header, row, folder, unlabelled):
    where = f"{csv_path}, line {line}"
    if len(row) != len(header):
        last = header[min(len(row), len(header)) - 1]
        raise BadInput(
            f"{where}, column {last}: the row has {len(row)} fields, the header {len(header)}"
        )
    cell = dict(zip(header, (text.strip() for text in row)))

    def label(name):
        if unlabelled and not cell[name]:
            return None
        for known, value in LABELS.items():
            if cell[name].lower() == known.lower():
                return value
        raise BadInput(
            f"{where}, column {name}: unknown label {cell[name]!r}; known: {', '.join(LABELS)}"
        )

    def number(name, low, high, empty=None):
        try:
            value = float(cell[name]) if cell[name] or empty is None else empty
        except ValueError:
            value = math.nan
        if not low <= value <= high and value != empty:
            raise BadInput(
                f"{where}, column {name}: {cell[name]!r} is no number from {low:g} to {high:g}"
            )
        return value

    def video(name):
        path = cell[name]
        if ".." in Path(path).parts:
            path = os.path.normpath(path)  # not by way of a link
        file = folder / latent_file(path)[0]
        try:
            found = stat.S_ISREG(file.stat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            found = False
        except (
            OSError,
            ValueError,
        ) as error:  # a name too long or with a zero byte; links in a circle
            fault = getattr(error, "strerror", None) or error
            raise BadInput(f"{where}, column {name}: {path[:40]!r} is no path ({fault})") from None
        if not path or not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):
            raise BadInput(
                f"{where}, column {name}: path {cell[name]!r} does not lie in the data folder {folder}"
            )
        if not found:
            raise BadInput(f"{where}, column {name}: no video {cell[name]!r} in {folder}")
        return path

    if not any(letter.isalnum() for letter in cell["prompt"]):
        raise BadInput(f"{where}, column prompt: {cell['prompt']!r} has no words")
    if cell["prompt"].lower() in NO_PROMPT:
        raise BadInput(
            f"{where}, column prompt: {cell['prompt']!r} stands for an empty cell; write the prompt"
        )
    path_a, path_b = (video(name) for name in PATHS)
    (file_a, row_a), (file_b, row_b) = (latent_file(path) for path in (path_a, path_b))
    if row_a == row_b and os.path.samefile(folder / file_a, folder / file_b):
        raise BadInput(
            f"{where}, column path_B: {path_b!r} is the clip of path_A; a pair is of two clips"
        )
    return Pair(
        path_a,
        path_b,
        cell["prompt"],
        tuple(label(name) for name in DIMENSIONS),
        *(number(name, 1e-3, 1e6) for name in NUMBERS),
        mos=tuple(number(name, 1, 5, empty=0.0) for name in RATINGS)
        if set(RATINGS) <= set(header)
        else (),
        models=tuple(cell[name] for name in MODELS) if set(MODELS) <= set(header) else (),
        overall=label("Overall") if "Overall" in header else INVALID,
        line=line,
    )


def write_pairs(pairs, csv_path):
    """Writes pairs so that read_pairs gives them back; rating and benchmark columns only where the pairs have them."""
    header = list(COLUMNS)
    header += RATINGS if any(pair.mos for pair in pairs) else ()
    header += (*MODELS, "Overall") if any(pair.models for pair in pairs) else ()
    path = Path(csv_path)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        for pair in pairs:
            cells = dict(zip(PATHS, pair.paths)) | {
                "prompt": pair.prompt,
                "Overall": NAMES[pair.overall],
            }
            cells |= dict(zip(DIMENSIONS, (NAMES[value] for value in pair.label)))
            cells |= dict(zip(NUMBERS, (pair.fps_a, pair.frames_a, pair.fps_b, pair.frames_b)))
            cells |= dict(zip(RATINGS, pair.mos)) | dict(zip(MODELS, pair.models))
            writer.writerow(cells)
    temporary.replace(path)

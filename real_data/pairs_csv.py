"""Preference pairs on disk: the public CSV schema of VideoAlign, one row a pair, its videos beside it (section 3.1).

    path_A, path_B                              video files or latents (video.py), relative to the CSV's folder
    prompt                                      text
    VQ, MQ, TA                                  A, B, same or invalid
    fps_A, num_frames_A, fps_B, num_frames_B    numbers; the videos' own are used, and a video with fewer frames refused
    MOS_A_VQ, MOS_A_MQ, ... MOS_B_TA            optional: ratings from 1 to 5; empty or 0 where there is none
    A_model, B_model, Overall                   in benchmark files only

Every fault in a file is a BadInput of one line that names file, line and column.
"""

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

from data import DIMENSIONS, INVALID
from real_data.video import latent_file
from runtime.cli import BadInput

LABELS = {"A": 1, "B": -1, "same": 0, "invalid": INVALID}
NAMES = {value: name for name, value in LABELS.items()} | {None: ""}  # None: nobody has looked yet
PATHS = ("path_A", "path_B")
NUMBERS = ("fps_A", "num_frames_A", "fps_B", "num_frames_B")
COLUMNS = (*PATHS, "prompt", *DIMENSIONS, *NUMBERS)
RATINGS = tuple(f"MOS_{side}_{name}" for side in "AB" for name in DIMENSIONS)
MODELS = ("A_model", "B_model")


@dataclass(frozen=True)
class Pair:
    """One row. Labels are 1 (A better), -1 (B), 0 (same) or INVALID."""

    path_a: str  # as written, relative to the CSV's folder
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


def read_pairs(csv_path, skipped=None):
    """The pairs of a CSV. BadInput names file, line and column of the first fault; with a list `skipped`, rows with a
    fault are left out and the fault's text is appended to it. Whether the videos can be decoded is seen later."""
    csv_path = Path(csv_path)
    try:
        content = csv_path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{csv_path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig").split("\n")
        try:
            header, field_number = before[0].split(","), len(next(csv.reader([before[-1].strip("\r") + "?"])))
        except csv.Error:  # no row at all
            header, field_number = [""], 1
        where = f"line {len(before)}, column {header[min(field_number, len(header)) - 1].strip() or 1}"
        byte = content[error.start]
        raise BadInput(f"{csv_path}, {where}: byte {byte:#x} is not UTF-8; save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    pairs, line = [], 1
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(csv_path, header)
        for row in reader:
            line += 1
            try:
                pairs.append(_parse(csv_path, line, header, row))
            except BadInput as fault:
                if skipped is None:
                    raise
                skipped.append(str(fault))
            line = reader.line_num  # a quoted prompt may span lines: a row is named by its first
    except csv.Error as error:
        raise BadInput(f"{csv_path}, line {reader.line_num}: not a CSV row ({error})") from None
    if not pairs:
        raise BadInput(f"{csv_path}: holds no pair" + (f"; the first fault: {skipped[0]}" if skipped else ""))
    return pairs


def _check_header(path, header):
    for name in header:
        if header.count(name) > 1:
            raise BadInput(f"{path}, line 1, column {name}: stands there twice")
    for name in COLUMNS:
        if name not in header:
            raise BadInput(f"{path}, line 1, column {name}: is missing; needed: {', '.join(COLUMNS)}")


def _parse(csv_path, line, header, row):
    folder, where = csv_path.parent, f"{csv_path}, line {line}"
    if len(row) != len(header):
        last = header[min(len(row), len(header)) - 1]
        raise BadInput(f"{where}, column {last}: the row has {len(row)} fields, the header {len(header)}")
    cell = dict(zip(header, (text.strip() for text in row)))

    def label(name):
        if cell[name] not in LABELS:
            raise BadInput(f"{where}, column {name}: unknown label {cell[name]!r}; known: {', '.join(LABELS)}")
        return LABELS[cell[name]]

    def number(name, low, high, empty=None):
        try:
            value = float(cell[name]) if cell[name] or empty is None else empty
        except ValueError:
            value = math.nan
        if not low <= value <= high and value != empty:
            raise BadInput(f"{where}, column {name}: {cell[name]!r} is no number from {low:g} to {high:g}")
        return value

    def video(name):
        try:
            path = (folder / latent_file(cell[name])[0]).resolve()
            found = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # a name too long or with a zero byte; links in a circle
            fault = getattr(error, "strerror", None) or error
            raise BadInput(f"{where}, column {name}: {cell[name][:40]!r} is no path ({fault})") from None
        if not cell[name] or not path.is_relative_to(folder.resolve()):
            raise BadInput(f"{where}, column {name}: path {cell[name]!r} does not lie in the data folder {folder}")
        if not found:
            raise BadInput(f"{where}, column {name}: no video {cell[name]!r} in {folder}")
        return cell[name]

    if not any(letter.isalnum() for letter in cell["prompt"]):
        raise BadInput(f"{where}, column prompt: {cell['prompt']!r} has no words")
    return Pair(
        *(video(name) for name in PATHS),
        cell["prompt"],
        tuple(label(name) for name in DIMENSIONS),
        *(number(name, 1e-3, 1e6) for name in NUMBERS),
        mos=tuple(number(name, 1, 5, empty=0.0) for name in RATINGS) if set(RATINGS) <= set(header) else (),
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
            cells = dict(zip(PATHS, pair.paths)) | {"prompt": pair.prompt, "Overall": NAMES[pair.overall]}
            cells |= dict(zip(DIMENSIONS, (NAMES[value] for value in pair.label)))
            cells |= dict(zip(NUMBERS, (pair.fps_a, pair.frames_a, pair.fps_b, pair.frames_b)))
            cells |= dict(zip(RATINGS, pair.mos)) | dict(zip(MODELS, pair.models))
            writer.writerow(cells)
    temporary.replace(path)

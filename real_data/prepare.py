"""Decodes, checks and caches the clips of a CSV before any training: python -m real_data.prepare pairs.csv

Training on a prepared CSV with the same --cache, --fps and model starts at once. The command may be
interrupted at any time and continues where it stopped; several may work on one cache.
"""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data import DIMENSIONS, split_words
from model import PRESETS, load_velocity
from real_data.disk_pairs import check_videos, row_videos, words_and_sizes
from real_data.pairs_csv import read_pairs
from runtime.cli import BadInput, Parser, progress_bar, run
from runtime.flags import video_flags


def arguments(argv=None):
    parser = Parser("Decodes, checks and caches all clips of a CSV, so that training starts at once.")
    add = parser.add_argument
    add("data", type=Path, help="CSV of pairs of videos or latents, in VideoAlign's format")
    add("--init", type=Path, help="video model that will be trained; decides clip size and words")
    add("--preset", choices=PRESETS, default="nano", help="or size of one trained from nothing")
    video_flags(add)
    return parser.parse_args(argv)


def spread(values, unit):
    """ "2 to 6 s, median 4": what is there of a list of numbers."""
    return f"{min(values):.4g} to {max(values):.4g} {unit}, median {np.median(values):.4g}"


def report(rows, facts, bad, vocabulary, config, args):
    """Lines: the usable Pair `rows`, {video: facts} of their clips, and the number of bad rows."""
    videos = [each for each in facts.values() if "seconds" in each]
    words = [word for row in rows for word in split_words(row.prompt)]
    unknown = sum(word not in vocabulary.ids for word in words) / len(words)
    lengths = [len(split_words(row.prompt)) for row in rows]
    yield f"{args.data}: {len(rows)} pairs can be used, {bad} cannot"
    yield f"clips    {len(facts)}, of which {len(facts) - len(videos)} latents; shape {config.video_shape}"
    if videos:
        sizes = Counter(f"{each['width']}x{each['height']}" for each in videos)
        short = sum(each["short"] for each in videos)
        yield "sizes    " + ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5))
        yield "rates    " + spread([each["frames"] / each["seconds"] for each in videos], "fps")
        yield "lengths  " + spread([each["seconds"] for each in videos], "s")
        yield f"         {short} too short for {config.frames} frames at {args.fps:g} fps"
    yield f"prompts  {len({row.prompt for row in rows})}, " + spread(lengths, "words")
    yield f"         {unknown:.1%} of the words unknown to the model"
    ties = (f"{name} {sum(row.label[i] == 0 for row in rows)}" for i, name in enumerate(DIMENSIONS))
    yield "ties     " + ", ".join(ties)


def write_faults(path, faults):
    """Writes (line, fault) of rows to a CSV; without any, removes what an earlier run wrote."""
    path.unlink(missing_ok=True)
    if faults:
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("line", "fault"), *sorted(faults)])


def prepare(args):
    """-> lines of the report. BadInput if no pair can be used."""
    config, words, skipped = PRESETS[args.preset], None, []
    if args.init:
        model, words = load_velocity(args.init)
        config = model.config
    rows = read_pairs(args.data, skipped, args.data_dir)
    vocabulary, config = words_and_sizes(args, rows, config, words)
    bar = progress_bar(f"decoding {args.data.name}", "video")
    options = {"skip": True, "folder": args.data_dir, "fps": args.fps, "short": args.short}
    facts, faults = check_videos(rows, args.data, config, args.cache, bar, **options)
    bad = [(int(re.match(r", line (\d+)", fault[len(str(args.data)) :])[1]), fault) for fault in skipped]
    for row in rows:
        bad += [(row.line, faults[video]) for video in row_videos(row) if video in faults][:1]
    for unfinished in args.cache.glob("*.npz.*.tmp"):  # of a process that was killed
        if unfinished.with_name(unfinished.name[:28]).exists():
            unfinished.unlink(missing_ok=True)
    bad_csv = args.data.with_suffix(".bad.csv")
    write_faults(bad_csv, bad)
    usable = [row for row in rows if not faults.keys() & set(row_videos(row))]
    if not usable:
        raise BadInput(f"{args.data}: no pair can be used; {bad_csv} says why")
    lines = [*report(usable, facts, len(bad), vocabulary, config, args)]
    return lines + [f"wrote {bad_csv}"] * bool(bad)


def main():
    print("\n".join(prepare(arguments())))


if __name__ == "__main__":
    run(main)

"""Decodes, checks and caches the clips of a CSV before any training: python -m real_data.prepare pairs.csv

Training on the same CSV with the same --cache, --fps and clip size then starts at once. The command
may be killed at any time and continues where it stopped; several may fill one cache.
"""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np

from data import DIMENSIONS
from model import PRESETS, load_velocity
from real_data.disk_pairs import check_videos, preset, row_videos, words_and_sizes
from real_data.pairs_csv import read_pairs
from runtime.cli import BadInput, Parser, check_writable, frame_size, positive, progress_bar, run


def arguments(argv=None):
    parser = Parser(
        "Decodes, checks and caches the clips of a CSV, so that training starts at once."
    )
    add = parser.add_argument
    add("data", type=Path, help="CSV of pairs of videos or latents, in VideoAlign's format")
    add("--init", type=Path, help="video model to be trained: its clip size and words are used")
    add("--preset", choices=PRESETS, default="nano", help="without --init: whose clip size is used")
    add(
        "--size",
        type=frame_size,
        help="without --init: height x width of a clip, for example 32x56",
    )
    add("--data-dir", type=Path, help="where the CSV's paths start from (default: its own folder)")
    add("--cache", type=Path, default=Path("out/clips"), help="folder of decoded clips")
    add("--fps", type=positive, default=2.0, help="frames a second of a video that are read (5.1)")
    text = "videos too short for the model's frames at --fps: spread the frames, or refuse"
    add("--short", choices=("spread", "refuse"), default="spread", help=text)
    return parser.parse_args(argv)


def report(rows, facts, vocabulary, config):
    """Lines about the Pair `rows` and the clips' facts {video: facts}."""
    videos = [each for each in facts if "seconds" in each]
    lines = [f"clips    {len(facts)}, {len(facts) - len(videos)} of them latents"]
    if videos:
        sizes = Counter(f"{each['width']}x{each['height']}" for each in videos)
        lines += [
            "sizes    " + ", ".join(f"{size} ({count})" for size, count in sizes.most_common(9))
        ]
        for name, unit, values in (
            ("rates", "fps", [each["frames"] / each["seconds"] for each in videos]),
            ("lengths", "s", [each["seconds"] for each in videos]),
        ):
            low, median, high = np.quantile(values, (0, 0.5, 1))
            lines += [f"{name:8} {low:.4g} to {high:.4g} {unit}, median {median:.4g}"]
        lines[-1] += (
            f"; {sum(each['short'] for each in videos)} too short for {config.frames} frames"
        )
    prompts = {row.prompt for row in rows}
    lines += [f"prompts  {len(prompts)}, {vocabulary.coverage(prompts, config.max_text)}"]
    ties = [sum(row.label[i] == 0 for row in rows) for i in range(len(DIMENSIONS))]
    return [
        *lines,
        "ties     " + ", ".join(f"{name} {count}" for name, count in zip(DIMENSIONS, ties)),
    ]


def prepare(args):
    """Lines to print. BadInput if no pair can be used, or a file cannot be written."""
    check_writable(args.cache, "--cache")
    config, words, skipped = preset(args.preset, args.size), None, []
    if args.init:
        model, words = load_velocity(args.init)
        config = model.config
    rows = read_pairs(args.data, skipped, args.data_dir)
    vocabulary, config = words_and_sizes(args, rows, config, words)
    bar = progress_bar(f"decoding {args.data.name}", "video")
    options = {"folder": args.data_dir, "fps": args.fps, "short": args.short}
    facts, faults = check_videos(rows, args.data, config, args.cache, bar, skip=True, **options)
    for unfinished in args.cache.glob("*.npz.*.tmp"):  # by a process that was killed
        if unfinished.with_name(unfinished.name.partition(".")[0] + ".npz").exists():
            unfinished.unlink(missing_ok=True)

    bad = [
        (int(re.match(r", line (\d+)", fault[len(str(args.data)) :])[1]), fault)
        for fault in skipped
    ]
    good = []
    for row in rows:
        found = [faults[video] for video in row_videos(row) if video in faults]
        if found:
            bad.append((row.line, found[0]))
        else:
            good.append(row)
    bad_csv = args.data.with_suffix(".bad.csv")
    try:
        with open(bad_csv, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("line", "fault"), *sorted(bad)])
    except OSError as error:
        raise BadInput(f"cannot write {bad_csv}: {error.strerror}") from None
    counts = f"{len(good)} pairs can be used; {len(bad)} cannot, see {bad_csv}"
    if not good:
        raise BadInput(f"{args.data}: {counts}")
    return [f"{args.data}: {counts}", *report(good, facts.values(), vocabulary, config)]


def main():
    print("\n".join(prepare(arguments())))


if __name__ == "__main__":
    run(main)

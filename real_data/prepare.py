"""Decodes, checks and caches the clips of a CSV before any training.

    python -m real_data.prepare pairs.csv

Training on the same CSV with the same --cache, --fps and clip size then starts at once. The command
may be killed at any time and continues where it stopped; several may fill one cache.
"""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import DIMENSIONS
from flags import Parser, add_flag, flag, flags_of
from model import load_velocity
from real_data.dataset import preset, usable_rows, words_and_sizes
from real_data.pairs_csv import read_pairs
from runtime.cli import BadInput, check_writable, run
from settings import Data, FromNothing


@dataclass
class Prepare(Data, FromNothing):
    """Decodes, checks and caches the clips of a CSV, so that training starts at once."""

    init: Path = flag(None, "model to be trained: its clip size and words are used", Path)


def prepare(settings):
    """Lines to print. BadInput if no pair can be used, or a file cannot be written."""
    check_writable(settings.cache, "--cache")
    config, words, skipped = preset(settings.preset, settings.size), None, []
    if settings.init:
        model, words = load_velocity(settings.init)
        config = model.config
    rows = read_pairs(settings.data, skipped, settings.data_dir)
    vocabulary, config = words_and_sizes(settings, rows, config, words)
    good, facts = usable_rows(rows, settings.data, config, settings, skipped)
    for unfinished in settings.cache.glob("*.npz.*.tmp"):  # by a process that was killed
        if unfinished.with_name(unfinished.name.partition(".")[0] + ".npz").exists():
            unfinished.unlink(missing_ok=True)
    bad_csv = settings.data.with_suffix(".bad.csv")
    bad = sorted((fault.line, str(fault)) for fault in skipped)
    try:
        with open(bad_csv, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("line", "fault"), *bad])
    except OSError as error:
        raise BadInput(f"cannot write {bad_csv}: {error.strerror}") from None
    counts = f"{len(good)} pairs can be used; {len(bad)} cannot, see {bad_csv}"
    return [f"{settings.data}: {counts}", *report(good, facts.values(), vocabulary, config)]


def report(rows, facts, vocabulary, config):
    """Lines about the Pair `rows` and their clips' facts."""
    videos = [each for each in facts if "seconds" in each]
    lines = [f"clips    {len(facts)}, {len(facts) - len(videos)} of them latents"]
    if videos:
        sizes = Counter(f"{each['width']}x{each['height']}" for each in videos)
        common = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(9))
        rates = quantiles([each["frames"] / each["seconds"] for each in videos], "fps")
        seconds = quantiles([each["seconds"] for each in videos], "s")
        num_short = sum(each["short"] for each in videos)
        lines += [f"sizes    {common}", f"rates    {rates}"]
        lines += [f"lengths  {seconds}; {num_short} too short for {config.frames} frames"]
    prompts = {row.prompt for row in rows}
    lines += [f"prompts  {len(prompts)}, {vocabulary.coverage(prompts, config.max_text)}"]
    ties = [f"{name} {sum(row.label[i] == 0 for row in rows)}" for i, name in enumerate(DIMENSIONS)]
    return [*lines, f"ties     {', '.join(ties)}"]


def quantiles(values, unit):
    low, median, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:.4g} to {high:.4g} {unit}, median {median:.4g}"


def main(argv=None):
    parser = Parser(Prepare.__doc__)
    parser.add_argument("data", type=Path, help="CSV of pairs of videos or latents")
    for name, about in flags_of(Prepare).items():
        if name not in ("data", "skip_bad"):
            add_flag(parser, name, about, getattr(Prepare, name))
    print("\n".join(prepare(Prepare(**vars(parser.parse_args(argv))))))


if __name__ == "__main__":
    run(main)

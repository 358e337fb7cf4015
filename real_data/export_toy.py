"""The toy's pairs as files: python -m real_data.export_toy DIR

Writes mp4 videos and CSV files in the public format, and prints how often each label occurs
(Table 1) and the mean ratings of each generator (Fig. 8).
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import world
from data import DIMENSIONS, Vocabulary
from flags import Parser, fraction, positive_int, seed
from model import ModelConfig
from real_data.pairs_csv import NAMES, Pair, write_pairs
from real_data.toy_pairs import MODELS, mixed_pairs
from real_data.video import FPS, write_video
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput, check_writable, pick_device, progress_bar, run

GENERATORS = (*world.GENERATORS, *MODELS)  # the names behind the numbers of Pairs.models
SPLITS = {"train": "train", "validation": "validation", "benchmark": "hard"}  # file -> prompts


def export(args):
    """Writes train.csv (args.pairs pairs), validation.csv and benchmark.csv (a fifth each, with
    prompts that never occur in train.csv) and their videos to the new folder args.folder.

    -> Markdown lines to print. BadInput if the folder exists."""
    folder = args.folder
    if folder.exists():
        raise BadInput(f"{folder}: exists already; name a new folder")
    check_writable(folder, "DIR")
    config, vocabulary, lines = ModelConfig(), Vocabulary(), []
    for number, (name, split) in enumerate(SPLITS.items()):
        count = args.pairs if name == "train" else max(1, args.pairs // 5)
        where = (config, vocabulary, pick_device("auto"), args.generated, args.init, args.cache)
        pairs = mixed_pairs(count, split, args.seed + 10 * number, *where)
        rows = [toy_row(name, i, pairs, vocabulary) for i in range(count)]
        write_videos(folder, rows, pairs)
        write_pairs(rows, folder / f"{name}.csv")
        lines += [*summary(name, pairs), ""]
    return [*lines, f"wrote {', '.join(f'{folder / name}.csv' for name in SPLITS)}"]


def toy_row(name, i, pairs, vocabulary):
    """Pair i of a file as a row."""
    models = [GENERATORS[number] for number in pairs.models[i]]
    paths = [f"videos/{name}/{i:06d}_{side}_{model}.mp4" for side, model in zip("AB", models)]
    mos, other = (), {}
    if name == "benchmark":
        overall = NAMES[pairs.overall[i].item()]
        other = {"A_model": models[0], "B_model": models[1], "Overall": overall}
    else:
        mos = tuple(round(rating, 4) for rating in pairs.mos[i].flatten().tolist())
    numbers = (FPS, float(ModelConfig().frames)) * 2
    label = tuple(pairs.label[i].tolist())
    return Pair(*paths, vocabulary.decode(pairs.y[i]), label, *numbers, mos, other)


def write_videos(folder, rows, pairs):
    (folder / rows[0].path_a).parent.mkdir(parents=True)

    def write(i):
        for path, clip in zip(rows[i].paths, pairs.sides(torch.tensor([i]))):
            write_video(folder / path, clip[0])

    bar = progress_bar("writing videos", "pair")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(bar(pool.map(write, range(len(rows))), len(rows)))


def summary(name, pairs):
    """Markdown lines: what the annotators said of the pairs."""
    lines = [f"## {name}: {len(pairs)} pairs", ""]
    lines += ["| | A better | tie | B better |", "|---|---|---|---|"]
    labels = dict(zip(DIMENSIONS, pairs.label.T)) | {"Overall": pairs.overall}
    for dimension, label in labels.items():
        shares = [f"{(label == value).float().mean():.3f}" for value in (1, 0, -1)]
        lines.append(f"| {dimension} | {' | '.join(shares)} |")
    lines += ["", "| generator | clips | mean rating VQ | MQ | TA |", "|---|---|---|---|---|"]
    for i, generator in enumerate(GENERATORS):
        ratings = pairs.mos[pairs.models == i]  # (clips, 3)
        if len(ratings):
            means = " | ".join(f"{mean:.2f}" for mean in ratings.mean(0))
            lines.append(f"| {generator} | {len(ratings)} | {means} |")
    return lines


def arguments(argv=None):
    parser = Parser("Writes the toy's preference pairs as videos and CSV files.")
    add = parser.add_argument
    add("command", choices=["export"], nargs="?", help="of data.py; may be left out")
    add("folder", type=Path, help="a new folder")
    add("--pairs", type=positive_int, default=200, help="to train on; other files: a fifth")
    add("--generated", type=fraction, default=0.5, help="share of pairs of clips by --init")
    add("--init", type=Path, default=WEIGHTS / "base.pt", help="base model (weights/base.pt)")
    add("--cache", type=Path, default=Path("out/clips"), help="folder of its sampled clips")
    add("--seed", type=seed, default=0, help="of prompts, clips and annotators")
    return parser.parse_args(argv)


def main():
    print("\n".join(export(arguments())))


if __name__ == "__main__":
    run(main)

"""The toy's pairs as files: python -m real_data.export_toy DIR

Writes mp4 videos and CSV files in the public format, and prints what the annotators said: how often
each label occurs (Table 1) and the mean ratings of each generator (Fig. 8).
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import world
from data import DIMENSIONS, Vocabulary
from flags import Parser, fraction, positive_int, seed
from model import ModelConfig
from real_data.generated import MODELS, mixed_pairs
from real_data.pairs_csv import NAMES, Pair, write_pairs
from real_data.video import FPS, write_video
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput, pick_device, progress_bar, run

GENERATORS = (*world.GENERATORS, *MODELS)  # the names behind the numbers of Pairs.models
SPLITS = {"train": "train", "validation": "validation", "benchmark": "hard"}  # file -> prompts


def toy_split(name, args, config, vocabulary):
    """The pairs of one of SPLITS: args.pairs to train on, a fifth as many in the others."""
    count = args.pairs if name == "train" else max(1, args.pairs // 5)
    split_seed = args.seed + 10 * list(SPLITS).index(name)
    where = (config, vocabulary, pick_device("auto"), args.generated, args.init, args.cache)
    return mixed_pairs(count, SPLITS[name], split_seed, *where)


def summary(name, pairs):
    """Markdown lines: what the annotators said of the pairs."""
    lines = [f"## {name}: {len(pairs)} pairs", ""]
    lines += ["| | A better | tie | B better | unanimous |", "|---|---|---|---|---|"]
    for i, dimension in enumerate(DIMENSIONS):
        unanimous = pairs.unanimous[:, i].float().mean()
        lines.append(f"| {dimension} | {label_shares(pairs.label[:, i])} | {unanimous:.3f} |")
    lines += [f"| Overall | {label_shares(pairs.overall)} | |", ""]
    lines += ["| generator | pairs it is in | mean rating VQ | MQ | TA |", "|---|---|---|---|---|"]
    for i, generator in enumerate(GENERATORS):
        by_this = pairs.models == i
        means = ""
        if by_this.any():
            means = " | ".join(f"{mean:.2f}" for mean in pairs.mos[by_this].mean(0))
        lines.append(f"| {generator} | {by_this.sum()} | {means} |")
    return [*lines, ""]


def label_shares(label):
    return " | ".join(f"{(label == value).float().mean():.3f}" for value in (1, 0, -1))


def export(args):
    """Writes train.csv (args.pairs pairs), validation.csv and benchmark.csv (a fifth each, with
    prompts that never occur in train.csv), their videos and a README.md to the new folder
    args.folder, all or nothing. -> lines to print. BadInput if the folder exists."""
    folder = args.folder
    if folder.exists():
        raise BadInput(f"{folder}: is there already; name a new folder")
    temporary = folder.with_name(folder.name + ".unfinished")
    config, vocabulary, lines = ModelConfig(), Vocabulary(), []
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in SPLITS:
            pairs = toy_split(name, args, config, vocabulary)
            write_split(temporary, name, pairs, vocabulary)
            lines += summary(name, pairs)
        (temporary / "README.md").write_text("\n".join(["# Toy preference pairs", "", *lines]))
        temporary.rename(folder)
    except OSError as error:
        raise BadInput(f"cannot write {temporary}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [*lines, f"wrote {', '.join(f'{folder / name}.csv' for name in SPLITS)}"]


def write_split(folder, name, pairs, vocabulary):
    (folder / "videos" / name).mkdir(parents=True)
    rows = [_toy_row(name, i, pairs, vocabulary) for i in range(len(pairs))]

    def write(i):
        for path, clip in zip(rows[i].paths, pairs.sides(torch.tensor([i]))):
            write_video(folder / path, clip[0])

    bar = progress_bar(f"writing {name}", "pair")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(bar(pool.map(write, range(len(rows))), len(rows)))
    write_pairs(rows, folder / f"{name}.csv")


def _toy_row(name, i, pairs, vocabulary):
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


def arguments(argv=None):
    parser = Parser("Writes the toy's preference pairs as videos and CSV files.")
    add = parser.add_argument
    add("command", choices=["export"], nargs="?", help="of data.py; may be left out")
    add("folder", type=Path, help="a new folder")
    add(
        "--pairs",
        type=positive_int,
        default=200,
        help="training pairs; other files: a fifth each",
    )
    add("--generated", type=fraction, default=0.5, help="share of pairs of clips by --init")
    add("--init", type=Path, default=WEIGHTS / "base.pt", help="base model (weights/base.pt)")
    add("--cache", type=Path, default=Path("out/clips"), help="folder of its sampled clips")
    add("--seed", type=seed, default=0, help="of prompts, clips and annotators")
    return parser.parse_args(argv)


def main():
    print("\n".join(export(arguments())))


if __name__ == "__main__":
    run(main)

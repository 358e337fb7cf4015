"""The toy world's pairs as a data set: mp4 and CSV in the public format, or a table of what the annotators said."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import world
from data import DIMENSIONS, INVALID, Vocabulary
from model import ModelConfig
from real_data.generated import MODELS, mixed_pairs
from real_data.pairs_csv import Pair, write_pairs
from real_data.video import FPS, write_video
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput, Parser, fraction, pick_device, positive_int, seed

GENERATORS = (*world.GENERATORS, *MODELS)  # the names behind the numbers of Pairs.models
SPLITS = {
    "train": "train",
    "validation": "validation",
    "benchmark": "hard",
}  # file -> the world's split of prompts


def toy_split(name, args, config, vocabulary):
    """The pairs of one of SPLITS: args.pairs to train on, a fifth as many in the others."""
    offset, size = (
        list(SPLITS).index(name),
        args.pairs if name == "train" else max(1, args.pairs // 5),
    )
    device = pick_device("auto")
    return mixed_pairs(
        size,
        SPLITS[name],
        args.seed + 10 * offset,
        config,
        vocabulary,
        device,
        args.generated,
        args.init,
        args.cache,
    )


# ---------------------------------------------------------------------------------------------
# The toy data set on disk


def summary(name, pairs):
    """Markdown lines: what came out, as in Table 1 and Fig. 8 of the paper."""
    lines = [
        f"## {name}: {len(pairs)} pairs",
        "",
        "| | A better | tie | B better | unanimous |",
        "|---|---|---|---|---|",
    ]
    for i, dimension in enumerate(DIMENSIONS):
        label = pairs.label[:, i]
        shares = [(label == value).float().mean().item() for value in (1, 0, -1)]
        shares.append(pairs.unanimous[:, i].float().mean().item())
        lines.append(f"| {dimension} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    shares = [(pairs.overall == value).float().mean().item() for value in (1, 0, -1)]
    lines.append("| Overall | " + " | ".join(f"{share:.3f}" for share in shares) + " | |")
    lines += [
        "",
        "| generator | pairs it is in | mean rating VQ | MQ | TA |",
        "|---|---|---|---|---|",
    ]
    for i, generator in enumerate(GENERATORS):
        here = pairs.models == i
        ratings = (
            [f"{rating:.2f}" for rating in pairs.mos[here].mean(0).tolist()]
            if here.any()
            else ["", "", ""]
        )
        lines.append(f"| {generator} | {here.sum()} | {' | '.join(ratings)} |")
    return [*lines, ""]


def export(args):
    """Writes toy pairs to args.folder: train.csv (args.pairs pairs), validation.csv and benchmark.csv (a fifth each;
    prompts that never occur in train.csv), their videos, and README.md with what came out. -> lines. BadInput if the
    folder exists.

    Everything is written beside it first: what stands there in the end is whole."""
    folder = args.folder
    if folder.exists():
        raise BadInput(f"{folder}: is there already; name a new folder")
    temporary = folder.with_name(folder.name + ".unfinished")
    config, vocabulary, lines = ModelConfig(), Vocabulary(), []
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in SPLITS:
            pairs = toy_split(name, args, config, vocabulary)
            rows = [_toy_row(name, i, pairs, vocabulary, config.frames) for i in range(len(pairs))]
            (temporary / "videos" / name).mkdir(parents=True, exist_ok=True)

            def write(i, rows=rows, pairs=pairs):
                for path, clip in zip(rows[i].paths, pairs.sides(torch.tensor([i]))):
                    write_video(temporary / path, clip[0])

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                done = pool.map(write, range(len(rows)))
                list(
                    tqdm(
                        done,
                        desc=f"writing {name}",
                        total=len(rows),
                        unit="pair",
                        dynamic_ncols=True,
                    )
                )
            write_pairs(rows, temporary / f"{name}.csv")
            lines += summary(name, pairs)
        (temporary / "README.md").write_text("\n".join(["# Toy preference pairs", "", *lines]))
        temporary.rename(folder)
    except OSError as error:
        raise BadInput(f"cannot write {temporary}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [*lines, f"wrote {', '.join(f'{folder / name}.csv' for name in SPLITS)}"]


def _toy_row(name, i, pairs, vocabulary, frames):
    paths = [
        f"videos/{name}/{i:06d}_{side}_{GENERATORS[g]}.mp4"
        for side, g in zip("AB", pairs.models[i])
    ]
    benchmark = name == "benchmark"
    return Pair(
        *paths,
        vocabulary.decode(pairs.y[i]),
        tuple(pairs.label[i].tolist()),
        *(FPS, float(frames)) * 2,
        mos=()
        if benchmark
        else tuple(round(value, 4) for value in pairs.mos[i].flatten().tolist()),
        models=tuple(GENERATORS[g] for g in pairs.models[i]) if benchmark else (),
        overall=pairs.overall[i].item() if benchmark else INVALID,
    )


def arguments(argv=None):
    parser = Parser(
        "The toy preference data: as videos and CSV files in the public format, or as a table."
    )
    add = parser.add_argument
    add("command", choices=["export", "table"], help="write files, or print what came out")
    add("folder", type=Path, nargs="?", help="export: a new folder")
    add(
        "--pairs",
        type=positive_int,
        default=200,
        help="training pairs; a fifth more each to validate and judge",
    )
    add(
        "--generated",
        type=fraction,
        default=0.5,
        help="share of them that compare clips of the base model --init",
    )
    add(
        "--init",
        type=Path,
        default=WEIGHTS / "base.pt",
        help="checkpoint of the base model (weights/base.pt)",
    )
    add("--cache", type=Path, default=Path("out/clips"), help="folder that keeps its clips")
    add("--seed", type=seed, default=0, help="of prompts, clips and annotators")
    args = parser.parse_args(argv)
    if (args.command == "export") != (args.folder is not None):
        raise BadInput("export needs a new folder, `python data.py export DIR`; table takes none")
    return args


def main():
    args = arguments()
    if args.command == "export":
        lines = export(args)
    else:
        made = {name: toy_split(name, args, ModelConfig(), Vocabulary()) for name in SPLITS}
        lines = [line for name, pairs in made.items() for line in summary(name, pairs)]
    print("\n".join(lines))

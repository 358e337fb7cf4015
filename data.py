"""Data: words to ids, clips to train a generator on, and preference pairs, toy or on disk (paper, section 3.1).

    python data.py export DIR           toy pairs as mp4 and CSV in the public format of VideoAlign (pairs_csv.py)
    python data.py table                what the annotators said of them: ties, agreement, ratings of each generator
    python train.py --algo reward --data DIR/train.csv          trains on any data set in that format

A batch is a dict of tensors, fixed by (seed, step) alone: an interrupted run that resumes at step n sees exactly the
batches it would have seen.

    base model   {"video" (B, C, T, H, W), "y" (B, S)}
    pairs        {"video_a", "video_b", "y", "label" (B, 3), "mos" (B, 2, 3)}
                 label 1: A is better, -1: B, 0: tie, INVALID: no label; mos: ratings of A and B from 1 to 5, 0: none

A worked pair: the prompt "a red circle moving left" is `y = [1, 3, 9, 2, 13, 0, 0, 0]`; generator early-2 renders A
(sharp, shaky), modern-5 renders B (hazy, steady); three annotators compare them, and the label is (1, -1, 0).
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import world
from common import BadInput, Parser, progress_bar, run
from distributed import rank, wait
from model import ModelConfig
from pairs_csv import PATHS, Pair, write_pairs
from pairs_csv import read_pairs as read_pairs
from parts import draw
from reward import DIMENSIONS, INVALID
from video import FPS, cached_clip, is_latent, read_latent, write_video

PAD, UNKNOWN = "<pad>", "<unk>"
TOY_WORDS = [PAD, "a", "moving", *world.COLOURS, *world.SHAPES, *world.DIRECTIONS]


def split_words(prompt):
    return re.findall(r"\w[\w'-]*", prompt.lower())


def vocabulary_of(prompts, most=4096):
    """A vocabulary of the words in real prompts, the `most` frequent ones where there are more."""
    counts = Counter(word for prompt in prompts for word in split_words(prompt))
    return Vocabulary([PAD, UNKNOWN, *(word for word, _ in counts.most_common(most - 2))])


class Vocabulary:
    """Words and their ids, stored in every checkpoint. Id 0 is padding; a prompt of nothing else is "no prompt"."""

    def __init__(self, words=TOY_WORDS):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.open = UNKNOWN in self.ids  # made from real prompts: strange words are read as UNKNOWN, long prompts cut

    def encode(self, prompts, length):
        """Prompts (list of B str) -> ids (B, length) int64. ValueError: an unknown word, none or too many."""
        y = torch.zeros(len(prompts), length, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            words = split_words(prompt)
            if self.open:
                words = [word if word in self.ids else UNKNOWN for word in words][:length]
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                raise ValueError(
                    f"unknown word {unknown[0]!r} in prompt {prompt!r}; words known: {', '.join(self.words[1:])}"
                )
            if not 0 < len(words) <= length:
                raise ValueError(f"prompt {prompt!r} has {len(words)} words; 1 to {length} can be used")
            y[i, : len(words)] = torch.tensor([self.ids[word] for word in words])
        return y

    def decode(self, y):
        """Ids (S,) of one prompt -> its text."""
        return " ".join(self.words[word] for word in y if word)

    def encode_attributes(self, attributes, length):
        """Attributes (B, 3) of toy prompts -> ids (B, length), the same as encode of their texts, without the texts."""
        y = torch.zeros(len(attributes), length, dtype=torch.int64)
        tables = [
            torch.tensor([self.ids[word] for word in table])
            for table in (world.COLOURS, world.SHAPES, world.DIRECTIONS)
        ]
        colour, shape, direction = (table[attributes[:, i]] for i, table in enumerate(tables))
        a, moving = (torch.full_like(colour, self.ids[word]) for word in ("a", "moving"))
        y[:, :5] = torch.stack((a, colour, shape, moving, direction), 1)
        return y


def step_rng(seed, step):
    """The generator for everything random in one training step (batch, t, noise, label dropout)."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)


def drop_prompts(y, probability, rng):
    """Replaces whole prompts by "no prompt" for classifier-free guidance; outside the model, so that a policy and its
    reference always drop the same ones."""
    return torch.where(draw(torch.rand, (len(y), 1), rng) < probability, torch.zeros_like(y), y)


def _draw_prompts(count, splits, rng):
    prompts = world.split_prompts(*splits)
    return prompts[torch.randint(len(prompts), (count,), generator=rng)]


def clip_batch(config, vocabulary, count, part):
    """A part of a batch of `count` rendered clips from all twelve generators for pretraining, drawn anew."""
    rng, here = part.source, part.cut(torch.arange(count))
    prompt = _draw_prompts(count, ("train", "validation"), rng)
    generator = torch.randint(len(world.GENERATORS), (count,), generator=rng)
    clips = world.draw_clips(prompt, generator, rng, config.frames)
    y = vocabulary.encode_attributes(prompt[here], config.max_text)
    return {"video": world.render(clips[here], config.size), "y": y}


# ---------------------------------------------------------------------------------------------------------------------
# Preference pairs: one class for toy and real ones


@dataclass
class Pairs:
    """N preference pairs. Clips are made or read when they are asked for, never all at once."""

    y: torch.Tensor  # (N, S) ids of the prompts
    clips: Callable  # (index (B,), side (B,), 0: A, 1: B) -> videos (B, C, T, H, W)
    models: torch.Tensor | None = None  # (N, 2) toy generators
    label: torch.Tensor | None = None  # (N, 3)
    unanimous: torch.Tensor | None = None  # (N, 3) toy: whether the three annotators agreed
    mos: torch.Tensor | None = None  # (N, 2, 3)
    overall: torch.Tensor | None = None  # (N,)
    truth: torch.Tensor | None = None  # (N, 2, 3) toy: the oracle's scores

    def __len__(self):
        return len(self.y)

    def sides(self, index):
        """Videos A and B of pairs `index` (B,)."""
        return self.clips(index.repeat(2), torch.arange(2).repeat_interleave(len(index))).chunk(2)

    def batch(self, index):
        video_a, video_b = self.sides(index)
        return {
            "video_a": video_a,
            "video_b": video_b,
            "y": self.y[index],
            "label": self.label[index],
            "mos": self.mos[index],
        }


def draw_pairs(count, splits, seed, frames):
    """Clips (a, b) for `count` pairs: the same prompt of the named splits, two different generators."""
    rng = torch.Generator().manual_seed(seed)
    prompt = _draw_prompts(count, splits, rng)
    models = len(world.GENERATORS)
    first = torch.randint(models, (count,), generator=rng)
    second = (first + torch.randint(1, models, (count,), generator=rng)) % models
    return world.draw_clips(prompt, first, rng, frames), world.draw_clips(prompt, second, rng, frames)


def toy_pairs(count, splits, seed, config, vocabulary):
    """`count` pairs of rendered clips, without labels, and the attributes (count, 3) of their prompts."""
    a, b = draw_pairs(count, splits, seed, config.frames)
    both = world.join(a, b)

    def clips(index, side):
        return world.render(both[index + side * count], config.size)

    y = vocabulary.encode_attributes(a.prompt, config.max_text)
    return Pairs(y, clips, torch.stack((a.generator, b.generator), 1)), a.prompt


def annotated_pairs(count, splits, seed, config, vocabulary, progress=lambda chunks: chunks):
    """`count` toy pairs with labels and ratings by the annotators, who look at the rendered clips."""
    pairs, prompt = toy_pairs(count, splits, seed, config, vocabulary)
    scores = []
    for index in progress(torch.arange(count).split(64)):
        scores.append([world.oracle(video, prompt[index]) for video in pairs.sides(index)])
    a, b = (torch.cat(side) for side in zip(*scores))
    rng = torch.Generator().manual_seed(seed + 1)
    label, unanimous = world.annotate(a, b, rng)
    overall, mos = world.annotate_overall(a, b, rng), world.rate(a, b, rng)
    return replace(pairs, label=label, unanimous=unanimous, mos=mos, overall=overall, truth=torch.stack((a, b), 1))


def disk_pairs(rows, csv_path, config, vocabulary, cache, skipped=None, progress=lambda videos, total: videos):
    """The Pair `rows` of a CSV as Pairs. Decodes their videos once, into the folder `cache`; latents are read in place.

    BadInput names the line and column of a video that cannot be used; with a list `skipped` its pairs are left out and
    the fault's text is appended."""
    root = Path(csv_path).parent
    videos = {}  # each distinct one: where it first stands, and the number of frames it is said to have
    for row in rows:
        for column, path, frames in zip(PATHS, row.paths, (row.frames_a, row.frames_b)):
            videos.setdefault(path, (f"{csv_path}, line {row.line}, column {column}", frames))
    faults = {}

    def decode(path):
        where, frames = videos[path]
        try:
            if is_latent(path):
                shape = read_latent(root / path).shape
            else:
                shape = tuple(cached_clip(root / path, cache, config.frames, config.size, said=frames).shape)
            if shape != config.video_shape:
                raise ValueError(f"has shape {shape}; the model takes {config.video_shape}")
        except ValueError as error:
            return path, f"{where}: {'latent' if is_latent(path) else 'video'} {path} {error}"
        except OSError as error:
            raise BadInput(f"cannot keep clips in {cache}: {error.strerror}; name a folder by --cache") from None
        return path, None

    if rank():
        wait()  # process 0 decodes for all; the others then find it done
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, fault in progress(pool.map(decode, videos), len(videos)):
            if fault and skipped is None:
                pool.shutdown(cancel_futures=True)
                raise BadInput(fault)
            if fault:
                faults[path] = fault
    if not rank():
        wait()
    if faults:
        skipped.extend(faults.values())
    rows = [row for row in rows if not faults.keys() & set(row.paths)]
    if not rows:
        raise BadInput(f"{csv_path}: no pair is left, all were skipped; the first: {skipped[0]}")

    def clip(path):
        try:
            if is_latent(path):
                return torch.from_numpy(read_latent(root / path).astype(np.float32))
            return cached_clip(root / path, cache, config.frames, config.size).float() / 127.5 - 1
        except (OSError, ValueError) as error:
            fault = getattr(error, "strerror", None) or error
            raise BadInput(f"{root / path}: cannot be read any more ({fault}); put it back and --resume") from None

    def clips(index, side):
        return torch.stack([clip(rows[i].paths[s]) for i, s in zip(index.tolist(), side.tolist())])

    try:
        y = vocabulary.encode([row.prompt for row in rows], config.max_text)
    except ValueError as error:
        raise BadInput(f"{csv_path}: {error}; --init must be a model of this data") from None
    label, overall = torch.tensor([row.label for row in rows]), torch.tensor([row.overall for row in rows])
    mos = torch.tensor([row.mos or (0.0,) * 6 for row in rows]).reshape(-1, 2, 3)
    return Pairs(y, clips, label=label, mos=mos, overall=overall)


# ---------------------------------------------------------------------------------------------------------------------
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
    lines += ["", "| generator | pairs it is in | mean rating VQ | MQ | TA |", "|---|---|---|---|---|"]
    for i, generator in enumerate(world.GENERATORS):
        here = pairs.models == i
        ratings = [f"{rating:.2f}" for rating in pairs.mos[here].mean(0).tolist()] if here.any() else ["", "", ""]
        lines.append(f"| {generator} | {here.sum()} | {' | '.join(ratings)} |")
    return [*lines, ""]


SPLITS = {"train": "train", "validation": "validation", "benchmark": "hard"}  # file -> the world's split of prompts


def toy_split(name, count, seed, config, vocabulary):
    """The pairs of one of SPLITS: `count` to train on, a fifth as many in the others."""
    offset, size = list(SPLITS).index(name), count if name == "train" else max(1, count // 5)
    bar = progress_bar(f"annotators look at {name}", "x64 pairs")
    return annotated_pairs(size, [SPLITS[name]], seed + 10 * offset, config, vocabulary, bar)


def export(folder, count, seed):
    """Writes toy pairs to `folder`: train.csv (`count` pairs), validation.csv and benchmark.csv (a fifth each; prompts
    that never occur in train.csv), their videos, and README.md with what came out. -> lines. BadInput if it exists.

    Everything is written beside `folder` first: what stands there in the end is whole."""
    folder = Path(folder)
    if folder.exists():
        raise BadInput(f"{folder}: is there already; name a new folder")
    temporary = folder.with_name(folder.name + ".unfinished")
    config, vocabulary, lines = ModelConfig(), Vocabulary(), []
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in SPLITS:
            pairs = toy_split(name, count, seed, config, vocabulary)
            rows = [_toy_row(name, i, pairs, vocabulary, config.frames) for i in range(len(pairs))]
            (temporary / "videos" / name).mkdir(parents=True, exist_ok=True)

            def write(i, rows=rows, pairs=pairs):
                for path, clip in zip(rows[i].paths, pairs.sides(torch.tensor([i]))):
                    write_video(temporary / path, clip[0])

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                done = pool.map(write, range(len(rows)))
                list(tqdm(done, desc=f"writing {name}", total=len(rows), unit="pair", dynamic_ncols=True))
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
    paths = [f"videos/{name}/{i:06d}_{side}_{world.GENERATORS[g]}.mp4" for side, g in zip("AB", pairs.models[i])]
    benchmark = name == "benchmark"
    return Pair(
        *paths,
        vocabulary.decode(pairs.y[i]),
        tuple(pairs.label[i].tolist()),
        *(FPS, float(frames)) * 2,
        mos=() if benchmark else tuple(round(value, 4) for value in pairs.mos[i].flatten().tolist()),
        models=tuple(world.GENERATORS[g] for g in pairs.models[i]) if benchmark else (),
        overall=pairs.overall[i].item() if benchmark else INVALID,
    )


def main():
    parser = Parser("The toy preference data: as videos and CSV files in the public format, or as a table.")
    parser.add_argument("command", choices=["export", "table"], help="write files, or print what came out")
    parser.add_argument("folder", type=Path, nargs="?", help="export: a new folder")
    parser.add_argument(
        "--pairs", type=int, default=200, help="training pairs; a fifth more each to validate and judge"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts, clips and annotators")
    args = parser.parse_args()
    if args.pairs < 1:
        raise BadInput(f"--pairs {args.pairs}: must be at least 1")
    if (args.command == "export") != (args.folder is not None):
        raise BadInput("export needs a new folder, `python data.py export DIR`; table takes none")
    if args.command == "export":
        lines = export(args.folder, args.pairs, args.seed)
    else:
        made = {name: toy_split(name, args.pairs, args.seed, ModelConfig(), Vocabulary()) for name in SPLITS}
        lines = [line for name, pairs in made.items() for line in summary(name, pairs)]
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)

"""Pairs of videos or latents on disk as training data: what --data and --val mean to each algorithm.

reward and nrg learn the labels of --data; pretrain takes both clips of every pair with their prompt; sft, rwr and dpo
take the clips and let VideoReward label them anew, as the paper does, or with --rank labels use the labels. Where a
model is trained from nothing its vocabulary and, with latents for clips, its channels, frames and size follow the data.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

from data import Pairs, Vocabulary, split_words, step_rng, vocabulary_of
from model import PRESETS
from real_data.pairs_csv import PATHS, read_pairs
from real_data.video import (
    FPS,
    cached_clip,
    check_length,
    clip_facts,
    is_latent,
    read_latent,
    to_video,
)
from runtime.cli import BadInput, progress_bar
from runtime.distributed import process_0_first, rank

MOST_WORDS = 128  # of a real prompt; the paper's are about 100 words long


def preset(name, size=None):
    """The ModelConfig of a preset, with another size if one is given."""
    config = PRESETS[name]
    return resized(config, "--size", size=size) if size else config


def resized(config, flag, **sizes):
    """`config` with other sizes; BadInput that names the flag where they do not fit."""
    try:
        return replace(config, **sizes)
    except ValueError as error:
        raise BadInput(f"{flag}: {error}") from None


def latent_sizes(args, row):
    """Channels, frames and size of the first clip of --data where it is a latent: those of a model made for it."""
    if not is_latent(row.path_a):
        return {"channels": 3}
    where = f"{args.data}, line {row.line}, column path_A: latent {row.path_a}"
    try:
        channels, frames, height, width = read_latent(
            (args.data_dir or args.data.parent) / row.path_a
        ).shape
    except (ValueError, OSError) as error:
        raise BadInput(f"{where} {error}") from None
    return {"channels": channels, "frames": frames, "size": args.size or (height, width)}


def row_videos(row):
    """(path, number of frames in the CSV) of both videos of a Pair."""
    return tuple(zip(row.paths, (row.frames_a, row.frames_b)))


def check_videos(
    rows, csv_path, config, cache, progress, skip=False, folder=None, fps=FPS, short="spread"
):
    """Decodes the distinct videos of the Pair `rows` into the folder `cache` and checks them and latents, each once.

    -> ({video: facts}, {video: what is wrong with it}), a video as in row_videos. BadInput names line and column of the
    first one that cannot be used, unless `skip`. short="refuse": so is one too short for the model's frames at `fps`.
    """
    root = Path(folder or Path(csv_path).parent)
    first = {}  # where each video occurs first
    for row in rows:
        for column, video in zip(PATHS, row_videos(row)):
            first.setdefault(video, f"{csv_path}, line {row.line}, column {column}")

    def check(video):
        path, frames = video
        try:
            facts = clip_facts(root / path, cache, *config.video_shape[1:], fps)
            if tuple(facts["shape"]) != config.video_shape:
                raise ValueError(
                    f"has shape {tuple(facts['shape'])}; the model takes {config.video_shape}"
                )
            if not is_latent(path):
                check_length(facts, frames)
            if short == "refuse" and facts["short"]:
                seconds = f"lasts {facts['seconds']:.2f} s"
                raise ValueError(
                    f"{seconds}, too short for {config.frames} frames at {fps:g} a second"
                )
            return video, facts, None
        except ValueError as error:
            return (
                video,
                None,
                f"{first[video]}: {'latent' if is_latent(path) else 'video'} {path} {error}",
            )
        except OSError as error:
            where = error.filename or cache
            raise BadInput(
                f"{where}: {error.strerror}; clips are cached in --cache {cache}"
            ) from None

    facts, faults = {}, {}
    with process_0_first():  # which decodes; the others then find the clips in the cache
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for video, found, fault in progress(pool.map(check, first), len(first)):
                if fault and not skip:
                    pool.shutdown(cancel_futures=True)
                    raise BadInput(fault)
                if fault:
                    faults[video] = fault
                else:
                    facts[video] = found
    return facts, faults


def usable_rows(rows, csv_path, config, cache, skipped, progress, **options):
    """The Pair `rows` whose clips can be used, all of them decoded. BadInput as in check_videos; with a list `skipped`
    the others are left out, and what is wrong is appended to it. `options` as in check_videos."""
    facts, faults = check_videos(
        rows, csv_path, config, cache, progress, skipped is not None, **options
    )
    if faults:
        skipped.extend(faults.values())
    good = [row for row in rows if not faults.keys() & set(row_videos(row))]
    if not good:
        raise BadInput(f"{csv_path}: no pair is left, all were skipped; the first: {skipped[0]}")
    count = sum(each["short"] for each in facts.values())
    if count and rank() == 0:
        short = (
            f"{count} of {len(facts)} videos are too short for the model's {config.frames} frames"
        )
        print(f"{csv_path}: {short}, which are spread over them; see --fps and --short")
    return good


def disk_pairs(
    rows, csv_path, config, vocabulary, cache, skipped=None, progress=lambda videos, total: videos
):
    """The Pair `rows` of a CSV as Pairs, as in usable_rows and pairs_of."""
    rows = usable_rows(rows, csv_path, config, cache, skipped, progress)
    return pairs_of(rows, csv_path, config, vocabulary, cache)


def pairs_of(rows, csv_path, config, vocabulary, cache, folder=None, fps=FPS):
    """The Pair `rows` of a CSV, whose videos usable_rows has decoded into the folder `cache`, as Pairs; latents are
    read in place."""
    root = Path(folder or Path(csv_path).parent)

    def clip(path):
        try:
            if is_latent(path):
                return torch.from_numpy(read_latent(root / path).astype(np.float32))
            return to_video(cached_clip(root / path, cache, *config.video_shape[1:], fps))
        except (OSError, ValueError) as error:
            fault = getattr(error, "strerror", None) or error
            raise BadInput(
                f"{root / path}: cannot be read any more ({fault}); put it back and --resume"
            ) from None

    def clips(index, side):
        return torch.stack([clip(rows[i].paths[s]) for i, s in zip(index.tolist(), side.tolist())])

    y = prompt_ids([row.prompt for row in rows], csv_path, vocabulary, config.max_text)
    label, overall = (
        torch.tensor([row.label for row in rows]),
        torch.tensor([row.overall for row in rows]),
    )
    mos = torch.tensor([row.mos or (0.0,) * 6 for row in rows]).reshape(-1, 2, 3)
    clip_id = [[crc32(str(root / path).encode()) for path in row.paths] for row in rows]
    return Pairs(y, clips, label=label, mos=mos, overall=overall, clip_id=torch.tensor(clip_id))


def words_and_sizes(args, rows, config, words=None):
    """(Vocabulary, config) of a model of `words` that is there already; without, of one made for the Pair `rows`."""
    if words:
        return Vocabulary(words), config
    prompts = sorted({row.prompt for row in rows})
    vocabulary = vocabulary_of(prompts)
    longest = max(len(split_words(prompt)) for prompt in prompts)
    sizes = {
        "vocab": len(vocabulary.words),
        "max_text": min(longest, MOST_WORDS),
        **latent_sizes(args, rows[0]),
    }
    return vocabulary, resized(config, "--data", **sizes)


def prompt_ids(prompts, csv_path, vocabulary, max_text):
    try:
        return vocabulary.encode(prompts, max_text)
    except ValueError as error:
        raise BadInput(f"{csv_path}: {error}; --init must be a model of this data") from None


def disk_prompts(args, vocabulary, max_text):
    """The prompts of --data that differ for a model: a list of N texts and ids (N, max_text). No video is opened."""
    prompts = [
        row.prompt for row in read_pairs(args.data, [] if args.skip_bad else None, args.data_dir)
    ]
    y, place = prompt_ids(prompts, args.data, vocabulary, max_text).unique(
        dim=0, return_inverse=True
    )
    texts = dict(zip(place.tolist(), prompts))
    return [texts[i] for i in range(len(y))], y


def disk_data(args, config, words=None, held_out=True):
    """(vocabulary, config, pairs to train on, {name: pairs to judge by}) from --data and --val; without --val a tenth
    of the prompts is held out, which differ from all others by more than case, punctuation and spaces. `words`: of a
    model that is there already and has this config; otherwise the vocabulary, and what of the config depends on the
    data, are made for it. Without `held_out` all pairs of --data are trained on."""
    skipped = [] if args.skip_bad else None
    rows = read_pairs(args.data, skipped, args.data_dir)
    if (
        args.algo == "reward"
        and args.loss == "regression"
        and not any(any(row.mos) for row in rows)
    ):
        raise BadInput(
            f"{args.data}: --loss regression needs ratings, the columns MOS_A_VQ to MOS_B_TA"
        )
    vocabulary, config = words_and_sizes(args, rows, config, words)

    def usable(rows, path):
        bar = progress_bar(f"decoding {path.name}", "video")
        options = {"folder": args.data_dir, "fps": args.fps, "short": args.short}
        return usable_rows(rows, path, config, args.cache, skipped, bar, **options)

    def load(rows, path):
        return pairs_of(rows, path, config, vocabulary, args.cache, args.data_dir, args.fps)

    train_rows = rows = usable(rows, args.data)
    held = {}
    if held_out and args.val:
        held_rows = usable(read_pairs(args.val, skipped, args.data_dir), args.val)
        held = {f"pairs of {args.val}": load(held_rows, args.val)}
    elif held_out:
        train_rows, held_rows = hold_out(rows, args.seed)
        name = "pairs of prompts held out of training"
        if held_rows is train_rows:
            name = "training pairs, all there are of one prompt"
        held = {name: load(held_rows, args.data)}
    pairs = load(train_rows, args.data)
    if rank() == 0:
        train_prompts = {plain(row.prompt): row.prompt for row in train_rows}
        print(f"training prompts: {vocabulary.coverage(train_prompts.values(), config.max_text)}")
        if held_out:
            prompts = {plain(row.prompt): row.prompt for row in held_rows}
            shared = f"{len(prompts.keys() & train_prompts)} of {len(prompts)} are also in training"
            print(
                f"validation prompts: {vocabulary.coverage(prompts.values(), config.max_text)}; {shared}"
            )
        if skipped:
            print(f"skipped {len(skipped)} rows or videos:", *skipped, sep="\n  ")
    return vocabulary, config, pairs, held


def plain(prompt):
    """A prompt without case, punctuation and spaces that tell nothing apart."""
    return " ".join(split_words(prompt))


def hold_out(rows, seed):
    """Rows to train on, and those of a tenth of the prompts; twice the same list if there is one."""
    prompts = sorted({plain(row.prompt) for row in rows})
    if len(prompts) == 1:
        return rows, rows
    order = torch.randperm(len(prompts), generator=step_rng(seed, -1)).tolist()
    out = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    held = [row for row in rows if plain(row.prompt) in out]
    return [row for row in rows if plain(row.prompt) not in out], held

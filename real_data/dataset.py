"""A CSV as a data set: pairs to train on and to judge by.

reward and nrg learn the labels of --data. pretrain takes both clips of each pair with their prompt.
sft, rwr and dpo take the clips, which VideoReward ranks as in the paper; with --rank labels the
labels rank them. A model that is trained from nothing gets its vocabulary from the data and, where
clips are latents, its channels, frames and size.

`settings` has the attributes of settings.Data, `val` and `seed`.
"""

import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from zlib import crc32

import numpy as np
import torch

from data import Pairs, Vocabulary, split_words, step_rng, vocabulary_of
from model import PRESETS
from real_data.pairs_csv import PATHS, RowFault, read_pairs
from real_data.video import cached_clip, check_length, clip_facts, is_latent, read_latent, to_video
from runtime.cli import BadInput, progress_bar
from runtime.distributed import process_0_first, rank

MOST_WORDS = 128  # of a real prompt; the paper's are about 100 words long


def disk_data(settings, config, words=None, held_out=True):
    """(vocabulary, config, pairs to train on, {name: pairs to judge by}) of --data and --val.

    words: the vocabulary of an existing model. Without it the vocabulary, and what of the config
    depends on the data, are made for the data. Without --val a tenth of the prompts is held out;
    without `held_out` all pairs are trained on."""
    skipped = [] if settings.skip_bad else None
    rows = read_pairs(settings.data, skipped, settings.data_dir)
    vocabulary, config = words_and_sizes(settings, rows, config, words)
    rows, _ = usable_rows(rows, settings.data, config, settings, skipped)
    train_rows, val_rows, val_pairs = rows, [], {}
    if held_out and settings.val:
        val_rows = read_pairs(settings.val, skipped, settings.data_dir)
        val_rows, _ = usable_rows(val_rows, settings.val, config, settings, skipped)
        name = f"pairs of {settings.val}"
    elif held_out:
        train_rows, val_rows = hold_out(rows, settings.seed)
        name = "pairs of prompts held out of training"
        if val_rows is train_rows:
            name = "training pairs, all there are of one prompt"
    if held_out:
        val_csv = settings.val or settings.data
        val_pairs[name] = pairs_of(val_rows, val_csv, config, vocabulary, settings)
    pairs = pairs_of(train_rows, settings.data, config, vocabulary, settings)
    if rank() == 0:
        print_coverage(train_rows, val_rows, vocabulary, config.max_text)
        if skipped:
            print(f"skipped {len(skipped)} rows:", *skipped, sep="\n  ")
    return vocabulary, config, pairs, val_pairs


def words_and_sizes(settings, rows, config, words=None):
    """(Vocabulary, config) of a model of `words`; without them, of a new model for the rows."""
    if words:
        return Vocabulary(words), config
    prompts = sorted({row.prompt for row in rows})
    vocabulary = vocabulary_of(prompts)
    longest = max(len(split_words(prompt)) for prompt in prompts)
    sizes = {"vocab": len(vocabulary.words), "max_text": min(longest, MOST_WORDS), "channels": 3}
    first = rows[0]
    if is_latent(first.path_a):
        try:
            array = read_latent((settings.data_dir or settings.data.parent) / first.path_a)
        except (ValueError, OSError) as error:
            fault = f"latent {first.path_a} {error}"
            raise RowFault(settings.data, first.line, "path_A", fault) from None
        sizes["channels"], sizes["frames"] = array.shape[:2]
        sizes["size"] = settings.size or array.shape[2:]
    return vocabulary, resized(config, "--data", **sizes)


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


def usable_rows(rows, csv_path, config, settings, skipped=None):
    """Decodes all clips of the rows into the folder settings.cache and checks them.

    -> (the rows whose clips can be used, {path: facts} of their clips). RowFault for the first row
    that cannot be used; with a list `skipped` the faults are appended to it."""
    root = settings.data_dir or csv_path.parent
    sizes = (*config.video_shape[1:], settings.fps)
    facts, locks = {}, defaultdict(Lock)

    def check(row):
        """The RowFault of a row; None if it has none."""
        for column, path, num_frames in zip(PATHS, row.paths, (row.frames_a, row.frames_b)):
            try:
                with locks[path]:  # rows may share clips
                    seen = clip_facts(root / path, settings.cache, *sizes)
                check_facts(seen, num_frames, config, settings)
            except ValueError as error:
                kind = "latent" if is_latent(path) else "video"
                fault = RowFault(csv_path, row.line, column, f"{kind} {path} {error}")
                if skipped is None:
                    raise fault from None
                return fault
            except OSError as error:
                where = f"{error.filename or settings.cache}: {error.strerror}"
                raise BadInput(f"{where}; clips are cached in --cache {settings.cache}") from None
            facts[path] = seen

    good = []
    bar = progress_bar(f"decoding {csv_path.name}", "pair")
    with process_0_first(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, fault in zip(rows, bar(pool.map(check, rows), len(rows))):
            if fault:
                skipped.append(fault)
            else:
                good.append(row)
    if not good:
        raise BadInput(f"{csv_path}: no pair is left, all were skipped; the first: {skipped[0]}")
    num_short = sum(each["short"] for each in facts.values())
    if num_short and rank() == 0:
        short = f"{num_short} of {len(facts)} videos are too short for {config.frames} frames"
        print(f"{csv_path}: {short}, which are spread over them; see --fps and --short")
    return good, facts


def check_facts(facts, num_frames, config, settings):
    """ValueError for a clip of another shape, a video that breaks off, or one that is too short."""
    shape = tuple(facts["shape"])
    if shape != config.video_shape:
        raise ValueError(f"has shape {shape}; the model takes {config.video_shape}")
    if "seconds" in facts:  # not those of a latent
        check_length(facts, num_frames)
    if facts["short"] and settings.short == "refuse":
        needed = f"{config.frames} frames at {settings.fps:g} a second"
        raise ValueError(f"lasts {facts['seconds']:.2f} s, too short for {needed}")


def hold_out(rows, seed):
    """Rows to train on, and those of a tenth of the prompts; of one prompt, all rows twice."""
    prompts = sorted({plain(row.prompt) for row in rows})
    if len(prompts) == 1:
        return rows, rows
    order = torch.randperm(len(prompts), generator=step_rng(seed, -1)).tolist()
    chosen = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    val_rows = [row for row in rows if plain(row.prompt) in chosen]
    return [row for row in rows if plain(row.prompt) not in chosen], val_rows


def plain(prompt):
    """A prompt without differences of case, punctuation and spaces."""
    return " ".join(split_words(prompt))


def print_coverage(train_rows, val_rows, vocabulary, max_text):
    prompts = {plain(row.prompt): row.prompt for row in train_rows}
    print(f"training prompts: {vocabulary.coverage(prompts.values(), max_text)}")
    if val_rows:
        val_prompts = {plain(row.prompt): row.prompt for row in val_rows}
        shared = f"{len(val_prompts.keys() & prompts)} of {len(val_prompts)} are also in training"
        print(
            f"validation prompts: {vocabulary.coverage(val_prompts.values(), max_text)}; {shared}"
        )


def pairs_of(rows, csv_path, config, vocabulary, settings):
    """Rows as Pairs, whose clips come from the cache that usable_rows fills, or are latents."""
    root = settings.data_dir or csv_path.parent

    def read(path):
        try:
            if is_latent(path):
                return torch.from_numpy(read_latent(root / path).astype(np.float32))
            sizes = (*config.video_shape[1:], settings.fps)
            return to_video(cached_clip(root / path, settings.cache, *sizes))
        except (OSError, ValueError) as error:
            fault = getattr(error, "strerror", None) or error
            text = f"cannot be read any more ({fault}); put it back and --resume"
            raise BadInput(f"{root / path}: {text}") from None

    def clips(index, side):
        paths = [rows[i].paths[s] for i, s in zip(index.tolist(), side.tolist())]
        return torch.stack([read(path) for path in paths])

    y = prompt_ids([row.prompt for row in rows], csv_path, vocabulary, config.max_text)
    label = torch.tensor([row.label for row in rows])
    mos = torch.tensor([row.mos or (0.0,) * 6 for row in rows]).reshape(-1, 2, 3)
    clip_id = [[crc32(str(root / path).encode()) for path in row.paths] for row in rows]
    return Pairs(y, clips, label=label, mos=mos, clip_id=torch.tensor(clip_id))


def disk_prompts(settings, vocabulary, max_text):
    """The prompts of --data that differ for a model: a list of N texts and ids (N, max_text)."""
    rows = read_pairs(settings.data, [] if settings.skip_bad else None, settings.data_dir)
    prompts = [row.prompt for row in rows]
    y = prompt_ids(prompts, settings.data, vocabulary, max_text)
    texts = dict(zip(map(tuple, y.tolist()), prompts))
    ids = sorted(texts)
    return [texts[each] for each in ids], torch.tensor(ids)


def prompt_ids(prompts, csv_path, vocabulary, max_text):
    try:
        return vocabulary.encode(prompts, max_text)
    except ValueError as error:
        raise BadInput(f"{csv_path}: {error}; --init must be a model of this data") from None

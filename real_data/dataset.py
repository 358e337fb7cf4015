"""A CSV as a data set: pairs to train on and to judge by, and people's labels as rewards.

reward and nrg learn the labels of --data. pretrain takes both clips of each pair with their prompt.
sft, rwr and dpo take the clips, which VideoReward ranks as in the paper; with --rank labels the
labels rank them. A model that is trained from nothing gets its vocabulary from the data and, where
clips are latents, its channels, frames and size.

`settings` has the attributes of settings.Data, `val` and `seed`.
"""

from dataclasses import replace
from zlib import crc32

import numpy as np
import torch

from data import INVALID, Pairs, Vocabulary, split_words, step_rng, vocabulary_of
from model import PRESETS
from real_data.pairs_csv import RowFault, read_pairs, usable_rows
from real_data.video import cached_clip, is_latent, read_latent, to_video
from runtime.cli import BadInput
from runtime.distributed import rank

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
    train_rows, held_rows, name = rows, [], ""
    if held_out and settings.val:
        held_rows = read_pairs(settings.val, skipped, settings.data_dir)
        held_rows, _ = usable_rows(held_rows, settings.val, config, settings, skipped)
        name = f"pairs of {settings.val}"
    elif held_out:
        train_rows, held_rows = hold_out(rows, settings.seed)
        name = "pairs of prompts held out of training"
        if held_rows is train_rows:
            name = "training pairs, all there are of one prompt"
    pairs = pairs_of(train_rows, settings.data, config, vocabulary, settings)
    held = {}
    if held_out:
        held_path = settings.val or settings.data
        held[name] = pairs_of(held_rows, held_path, config, vocabulary, settings)
    if rank() == 0:
        print_coverage(train_rows, held_rows, vocabulary, config.max_text)
        if skipped:
            print(f"skipped {len(skipped)} rows:", *skipped, sep="\n  ")
    return vocabulary, config, pairs, held


def print_coverage(train_rows, held_rows, vocabulary, max_text):
    prompts = {plain(row.prompt): row.prompt for row in train_rows}
    print(f"training prompts: {vocabulary.coverage(prompts.values(), max_text)}")
    if held_rows:
        held = {plain(row.prompt): row.prompt for row in held_rows}
        shared = f"{len(held.keys() & prompts)} of {len(held)} are also in training"
        print(f"validation prompts: {vocabulary.coverage(held.values(), max_text)}; {shared}")


def disk_prompts(settings, vocabulary, max_text):
    """The prompts of --data that differ for a model: a list of N texts and ids (N, max_text)."""
    rows = read_pairs(settings.data, [] if settings.skip_bad else None, settings.data_dir)
    prompts = [row.prompt for row in rows]
    y = prompt_ids(prompts, settings.data, vocabulary, max_text)
    texts = dict(zip(map(tuple, y.tolist()), prompts))
    ids = sorted(texts)
    return [texts[each] for each in ids], torch.tensor(ids)


def pairs_of(rows, csv_path, config, vocabulary, settings):
    """Rows as Pairs, whose clips come from the cache that usable_rows fills, or are latents."""
    root = settings.data_dir or csv_path.parent

    def clip(path):
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
        return torch.stack([clip(rows[i].paths[s]) for i, s in zip(index.tolist(), side.tolist())])

    y = prompt_ids([row.prompt for row in rows], csv_path, vocabulary, config.max_text)
    label = torch.tensor([row.label for row in rows])
    mos = torch.tensor([row.mos or (0.0,) * 6 for row in rows]).reshape(-1, 2, 3)
    clip_id = [[crc32(str(root / path).encode()) for path in row.paths] for row in rows]
    return Pairs(y, clips, label=label, mos=mos, clip_id=torch.tensor(clip_id))


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


def words_and_sizes(settings, rows, config, words=None):
    """(Vocabulary, config) of a model of `words`; without them, of a new model for the rows."""
    if words:
        return Vocabulary(words), config
    prompts = sorted({row.prompt for row in rows})
    vocabulary = vocabulary_of(prompts)
    longest = max(len(split_words(prompt)) for prompt in prompts)
    sizes = {"vocab": len(vocabulary.words), "max_text": min(longest, MOST_WORDS), "channels": 3}
    if is_latent(rows[0].path_a):
        sizes |= latent_sizes(settings, rows[0])
    return vocabulary, resized(config, "--data", **sizes)


def latent_sizes(settings, row):
    """Channels, frames and size of a model for latents like the row's first."""
    root = settings.data_dir or settings.data.parent
    try:
        channels, frames, *size = read_latent(root / row.path_a).shape
    except (ValueError, OSError) as error:
        raise RowFault(settings.data, row.line, "path_A", f"latent {row.path_a} {error}") from None
    return {"channels": channels, "frames": frames, "size": settings.size or tuple(size)}


def prompt_ids(prompts, csv_path, vocabulary, max_text):
    try:
        return vocabulary.encode(prompts, max_text)
    except ValueError as error:
        raise BadInput(f"{csv_path}: {error}; --init must be a model of this data") from None


def plain(prompt):
    """A prompt without differences of case, punctuation and spaces."""
    return " ".join(split_words(prompt))


def hold_out(rows, seed):
    """Rows to train on, and those of a tenth of the prompts; of one prompt, all rows twice."""
    prompts = sorted({plain(row.prompt) for row in rows})
    if len(prompts) == 1:
        return rows, rows
    order = torch.randperm(len(prompts), generator=step_rng(seed, -1)).tolist()
    chosen = {prompts[i] for i in order[: max(1, len(prompts) // 10)]}
    held = [row for row in rows if plain(row.prompt) in chosen]
    return [row for row in rows if plain(row.prompt) not in chosen], held


def label_rewards(label, mos, align, ratings=False):
    """People's labels (N, 3) as rewards r (N, 2) of both clips, the mean over VQ, MQ and TA under
    the weights `align`: 1 for the better clip, -1 for the other, 0 for both clips of a tie.

    An invalid dimension adds nothing; r is nan where no dimension that has a weight is valid. With
    `ratings`, a clip that has a rating in mos (N, 2, 3) counts by its z-score over all ratings of
    that dimension: of unit spread, as VideoReward's scores are."""
    valid = (label != INVALID)[:, None].expand(-1, 2, -1)  # (N, 2, 3)
    scores = torch.stack((label, -label), 1).double() * valid
    if ratings:
        rated = mos != 0
        count = rated.sum((0, 1)).clamp(min=1)
        centred = (mos - mos.sum((0, 1)) / count) * rated
        std = (centred.square().sum((0, 1)) / count).sqrt().clamp(min=1e-3)
        scores = torch.where(rated, centred / std, scores)
        valid = valid | rated
    weights = torch.tensor(align, dtype=torch.float64)
    r = (scores @ (weights / weights.abs().sum())).round(decimals=6)  # .1 + .2 - .3 is a tie
    return torch.where((valid & (weights != 0)).any(-1), r, torch.nan).float()

"""Data: prompts to ids, preference pairs, and the batches made of them (section 3.1).

    python -m real_data.export_toy DIR                        toy pairs as mp4 and CSV (VideoAlign)
    python train.py --algo reward --data DIR/train.csv        trains on any data set in that format

A batch is a dict of tensors that (seed, step) alone determine; its names are the arguments of the
loss that takes it. It holds all that is random in a step: dropped prompts, times t (B,), noise x1
like the clips. These are drawn for the whole batch, and a process or a micro-batch takes its rows,
so that clip 17 has the same noise on one GPU and on eight.

    label (B, 3)     VQ, MQ, TA. 1: A is better, -1: B, 0: tie, INVALID: no label
    mos (B, 2, 3)    ratings of A and B from 1 to 5, 0: none
    weight           of each label or rating, with mean one over the whole batch (mean_one)

An example: the prompt "a red circle moving left" is `y = [1, 3, 9, 2, 13, 0, 0, 0]`. Generator
early-2 renders clip A (sharp, shaky) and modern-5 renders B (hazy, steady). Three annotators
compare them, and the label is (1, -1, 0).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

import world
from flow import draw_time
from words import split_words

DIMENSIONS = ("VQ", "MQ", "TA")
INVALID = -100  # a missing label

PAD, UNKNOWN = "<pad>", "<unk>"
TOY_WORDS = [PAD, "a", "moving", *world.COLOURS, *world.SHAPES, *world.DIRECTIONS]


def vocabulary_of(prompts, most=4096):
    """A Vocabulary of the words in real prompts, the most frequent ones if there are too many."""
    counts = Counter(word for prompt in prompts for word in split_words(prompt))
    return Vocabulary([PAD, UNKNOWN, *(word for word, _ in counts.most_common(most - 2))])


class Vocabulary:
    """Words and their ids, stored in every checkpoint. Id 0 is padding, and padding alone is no
    prompt. With UNKNOWN among the words (`open`) strange words are read as UNKNOWN and long prompts
    are cut; without it both are errors."""

    def __init__(self, words=TOY_WORDS):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.open = UNKNOWN in self.ids

    def encode(self, prompts, length):
        """Prompts (B str) -> ids (B, length). ValueError for an unknown word, none or too many."""
        y = torch.zeros(len(prompts), length, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            words = split_words(prompt)
            if self.open:
                words = [word if word in self.ids else UNKNOWN for word in words][:length]
            unknown = [word for word in words if word not in self.ids]
            if unknown:
                fault = f"unknown word {unknown[0]!r} in prompt {prompt!r}"
                raise ValueError(f"{fault}; words known: {', '.join(self.words[1:])}")
            if not 0 < len(words) <= length:
                fault = f"prompt {prompt!r} has {len(words)} words"
                raise ValueError(f"{fault}; 1 to {length} can be used")
            y[i, : len(words)] = torch.tensor([self.ids[word] for word in words])
        return y

    def coverage(self, prompts, length):
        """What encode loses of prompts, as text: the share of unknown words, and prompts cut."""
        split = [split_words(prompt) for prompt in prompts]
        words = [word for prompt in split for word in prompt]
        unknown = sum(word not in self.ids for word in words) / max(1, len(words))
        cut = sum(len(prompt) > length for prompt in split)
        return f"{unknown:.1%} of the words unknown, {cut} cut to {length} words"

    def decode(self, y):
        """Ids (S,) of one prompt -> its text."""
        return " ".join(self.words[word] for word in y if word)

    def encode_attributes(self, attributes, length):
        """Attributes (B, 3) of toy prompts -> ids (B, length)."""
        return self.encode([world.prompt_text(row) for row in attributes.tolist()], length)


def step_rng(seed, step):
    """The generator of all that is random in one training step. No two pairs of seed and step share
    one; negative steps are epochs and rounds."""
    if -750_003 <= step < 250_000:
        return torch.Generator().manual_seed((seed * 1_000_003 + step) * 2 + 1)
    return torch.Generator().manual_seed((seed * 2**31 + step + 2**30) * 2)


def epoch_index(count, batch, step, seed):
    """Indices (batch,) of step `step`; each epoch is a new permutation of `count` items."""
    position = torch.arange(step * batch, (step + 1) * batch)
    index = torch.empty_like(position)
    for epoch in (position // count).unique().tolist():
        in_epoch = position // count == epoch
        order = torch.randperm(count, generator=step_rng(seed, -1 - epoch))
        index[in_epoch] = order[position[in_epoch] % count]
    return index


def drop_prompts(y, probability, rng):
    """Replaces whole prompts by no prompt, for CFG; outside the model, so that a policy and its
    reference drop the same ones."""
    return torch.where(torch.rand(len(y), 1, generator=rng) < probability, torch.zeros_like(y), y)


def draw_noise(count, shape, shift, rng, normal=False):
    """{"t": times (count,) of flow.draw_time, "x1": noise (count, *shape)} of a batch."""
    t = draw_time(count, rng, shift, normal)
    return {"t": t, "x1": torch.randn(count, *shape, generator=rng)}


def take(batch, rows):
    """The rows of every tensor of a batch."""
    return {name: value[rows] for name, value in batch.items()}


def mean_one(mask):
    """Weights that turn a mean over all entries, or over equal parts, into one over `mask`."""
    return mask / mask.float().mean().clamp(min=1 / max(1, mask.numel()))


@dataclass
class Pairs:
    """N preference pairs, whose clips are rendered or read on demand."""

    y: torch.Tensor  # (N, S) ids of the prompts
    clips: Callable  # (index (B,), side (B,), 0: A, 1: B) -> videos (B, C, T, H, W)
    models: torch.Tensor | None = None  # (N, 2) toy generators
    label: torch.Tensor | None = None  # (N, 3)
    mos: torch.Tensor | None = None  # (N, 2, 3)
    overall: torch.Tensor | None = None  # (N,)
    truth: torch.Tensor | None = None  # (N, 2, 3) toy: the oracle's scores
    clip_id: torch.Tensor | None = None  # (N, 2) equal for equal clips; by default all differ

    def __post_init__(self):
        if self.clip_id is None:
            self.clip_id = torch.arange(2 * len(self)).reshape(-1, 2)

    def __len__(self):
        return len(self.y)

    def sides(self, index):
        """Videos A and B of pairs `index` (B,)."""
        return self.clips(index.repeat(2), torch.arange(2).repeat_interleave(len(index))).chunk(2)


if __name__ == "__main__":
    from real_data.export_toy import main
    from runtime.cli import run

    run(main)

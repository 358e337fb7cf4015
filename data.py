"""Data: words to ids, clips to train a generator on, and toy preference pairs (paper, section 3.1).

A batch is a dict of tensors, made without a loop over samples and fixed by (seed, step) alone: an interrupted run that
resumes at step n sees exactly the batches it would have seen.

    base model   {"video" (B, 3, T, H, W), "y" (B, S)}
    pairs        {"video_a", "video_b", "y", "label" (B, 3)}   label 1: A is better, -1: B, 0: tie, INVALID: no label

A worked pair: the prompt "a red circle moving left" is `y = [1, 3, 9, 2, 13, 0, 0, 0]`; generator early-2 renders A
(sharp, shaky), modern-5 renders B (hazy, steady); three annotators compare them, and the label is (1, -1, 0).
"""

from dataclasses import dataclass

import torch

import world

PAD = "<pad>"
TOY_WORDS = [PAD, "a", "moving", *world.COLOURS, *world.SHAPES, *world.DIRECTIONS]


class Vocabulary:
    """Words and their ids, stored in every checkpoint. Id 0 is padding; a prompt of nothing else is "no prompt"."""

    def __init__(self, words=TOY_WORDS):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, prompts, length):
        """Prompts (list of B str) -> ids (B, length) int64. ValueError: an unknown word, none or too many."""
        y = torch.zeros(len(prompts), length, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            words = prompt.lower().split()
            unknown = [word for word in words if word not in self.ids or word == PAD]
            if unknown:
                raise ValueError(
                    f"unknown word {unknown[0]!r} in prompt {prompt!r}; words known: {', '.join(self.words[1:])}"
                )
            if not 0 < len(words) <= length:
                raise ValueError(f"prompt {prompt!r} has {len(words)} words; 1 to {length} can be used")
            y[i, : len(words)] = torch.tensor([self.ids[word] for word in words])
        return y

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
    return torch.where(torch.rand(len(y), 1, generator=rng) < probability, torch.zeros_like(y), y)


def _draw_prompts(count, splits, rng):
    prompts = world.split_prompts(*splits)
    return prompts[torch.randint(len(prompts), (count,), generator=rng)]


def clip_batch(config, vocabulary, count, rng):
    """A batch of rendered clips from all twelve generators for pretraining, drawn anew."""
    prompt = _draw_prompts(count, ("train", "validation"), rng)
    generator = torch.randint(len(world.GENERATORS), (count,), generator=rng)
    clips = world.draw_clips(prompt, generator, rng, config.frames)
    return {"video": world.render(clips, config.size), "y": vocabulary.encode_attributes(prompt, config.max_text)}


@dataclass
class Pairs:
    """Preference pairs of rendered clips: what to render, and the annotators' labels (N, 3)."""

    a: world.Clips
    b: world.Clips
    label: torch.Tensor
    unanimous: torch.Tensor

    def __len__(self):
        return len(self.label)

    def batch(self, index, config, vocabulary):
        """The pairs of `index` (B,), rendered."""
        a, b = self.a[index], self.b[index]
        y = vocabulary.encode_attributes(a.prompt, config.max_text)
        video_a, video_b = world.render(a, config.size), world.render(b, config.size)
        return {"video_a": video_a, "video_b": video_b, "y": y, "label": self.label[index]}


def draw_pairs(count, splits, seed, frames):
    """Clips (a, b) for `count` pairs: the same prompt of the named splits, two different generators."""
    rng = torch.Generator().manual_seed(seed)
    prompt = _draw_prompts(count, splits, rng)
    models = len(world.GENERATORS)
    first = torch.randint(models, (count,), generator=rng)
    second = (first + torch.randint(1, models, (count,), generator=rng)) % models
    return world.draw_clips(prompt, first, rng, frames), world.draw_clips(prompt, second, rng, frames)


def annotated_pairs(count, splits, seed, config, progress=lambda chunks: chunks):
    """`count` toy pairs with labels by the annotators, who look at the rendered clips."""
    a, b = draw_pairs(count, splits, seed, config.frames)
    scores = []
    for start in progress(range(0, count, 64)):
        part = slice(start, start + 64)
        scores.append([world.oracle(world.render(side[part], config.size), side.prompt[part]) for side in (a, b)])
    score_a, score_b = (torch.cat(side) for side in zip(*scores))
    label, unanimous = world.annotate(score_a, score_b, torch.Generator().manual_seed(seed + 1))
    return Pairs(a, b, label, unanimous)

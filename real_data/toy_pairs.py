"""The toy's data: clips of twelve generators to pretrain on, and labelled pairs (section 3.1).

Clips are drawn first and rendered when they are read. Three annotators and a reviewer label pairs.
"""

from dataclasses import replace

import torch

import world
from data import TOY_WORDS, Pairs
from runtime.cli import BadInput

TOY_LENGTH = 5  # words of a toy prompt


def check_toy(config, vocabulary):
    """BadInput unless the toy has clips and prompts for a model of this config and vocabulary."""
    if config.channels != 3:
        raise BadInput(
            f"this model takes latents, clips of shape {config.video_shape} (C, T, H, W), and the "
            "toy renders pixels; give --data CSV (examples/toy_latents.py writes latents to try)"
        )
    if isinstance(config.size, tuple):  # height and width differ
        size = "{}x{}".format(*config.size)
        raise BadInput(f"clips of {size} need --data: the toy renders square ones; give --data CSV")
    if vocabulary.words != TOY_WORDS or config.max_text < TOY_LENGTH:
        raise BadInput(
            "this model does not know the toy's prompts; give --data CSV with its training data"
        )


def draw_prompts(count, splits, rng):
    """Attributes (count, 3) of prompts of the named splits."""
    prompts = world.split_prompts(*splits)
    return prompts[torch.randint(len(prompts), (count,), generator=rng)]


def draw_clips(count, config, vocabulary, rng):
    """Clips of all twelve generators, not rendered yet, and ids y (count, S) of their prompts."""
    prompt = draw_prompts(count, ("train", "validation"), rng)
    generator = torch.randint(len(world.GENERATORS), (count,), generator=rng)
    clips = world.draw_clips(prompt, generator, rng, config.frames)
    return clips, vocabulary.encode_attributes(prompt, config.max_text)


def other_prompts(y, vocabulary, rng):
    """Toy prompts y (B, S) with another colour, shape or direction; real prompts rolled by one."""
    if vocabulary.open:
        return y.roll(1, 0)
    which = torch.randint(3, (len(y), 1), generator=rng)
    for kind, words in enumerate((world.COLOURS, world.SHAPES, world.DIRECTIONS)):
        first, count = vocabulary.ids[next(iter(words))], len(words)  # their ids are consecutive
        changed = first + (y - first + torch.randint(1, count, (len(y), 1), generator=rng)) % count
        y = torch.where((which == kind) & (y >= first) & (y < first + count), changed, y)
    return y


def draw_pairs(count, splits, seed, frames):
    """Clips (a, b) of `count` pairs: one prompt of the named splits, two different generators."""
    rng = torch.Generator().manual_seed(seed)
    prompt = draw_prompts(count, splits, rng)
    models = len(world.GENERATORS)
    first = torch.randint(models, (count,), generator=rng)
    second = (first + torch.randint(1, models, (count,), generator=rng)) % models
    a = world.draw_clips(prompt, first, rng, frames)
    return a, world.draw_clips(prompt, second, rng, frames)


def toy_pairs(count, splits, seed, config, vocabulary):
    """`count` unlabelled pairs of rendered clips, and attributes (count, 3) of their prompts."""
    a, b = draw_pairs(count, splits, seed, config.frames)
    both = world.join(a, b)

    def clips(index, side):
        return world.render(both[index + side * count], config.size)

    y = vocabulary.encode_attributes(a.prompt, config.max_text)
    return Pairs(y, clips, torch.stack((a.generator, b.generator), 1)), a.prompt


def annotate_pairs(pairs, prompt, seed, progress=lambda chunks: chunks):
    """Pairs of clips of toy prompts (count, 3) with the annotators' labels and ratings."""
    scores = []
    for index in progress(torch.arange(len(pairs)).split(64)):
        scores.append([world.oracle(video, prompt[index]) for video in pairs.sides(index)])
    a, b = (torch.cat(side) for side in zip(*scores))
    rng = torch.Generator().manual_seed(seed + 1)
    label, unanimous = world.annotate(a, b, rng)
    overall, mos = world.annotate_overall(a, b, rng), world.rate(a, b, rng)
    truth = torch.stack((a, b), 1)
    labels = {"label": label, "unanimous": unanimous, "mos": mos, "overall": overall}
    return replace(pairs, truth=truth, **labels)


def annotated_pairs(count, splits, seed, config, vocabulary):
    """`count` annotated pairs of rendered clips."""
    return annotate_pairs(*toy_pairs(count, splits, seed, config, vocabulary), seed)

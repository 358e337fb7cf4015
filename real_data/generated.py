"""The base model as four more generators: its own clips, sampled once and kept on disk, in pairs for the annotators.

Every clip that people compare in the paper is a generated one (section 3.1), and VideoReward will judge generated
clips. So a share of its pairs compares these: clips of one toy prompt, sampled from the base model at the settings of
MODELS. Held-out prompts and other settings give pairs to judge it by.
"""

import hashlib
import math
from dataclasses import fields
from functools import reduce

import torch

import world
from data import TOY_WORDS, Pairs, Vocabulary, step_rng
from model import load_velocity
from real_data.toy_pairs import annotate_pairs, check_toy, toy_pairs
from real_data.video import to_bytes, to_video
from runtime.checkpoint import check_same_data, save_checkpoint
from runtime.cli import progress_bar
from runtime.distributed import process_0_first
from sample import sample_many

MODELS = {  # names, and settings of sample.sample
    "base": {},
    "base-cfg2": {"cfg": 2.0},
    "base-cfg0.5": {"cfg": 0.5},  # half-way to the model without a prompt: worse in motion and text
    "base-6steps": {"steps": 6},
}
MOST_CLIPS = 40  # of each prompt: 71 MB for the training prompts
ON_POLICY = {
    "models": {"base": {}},
    "most": 100,
}  # pairs to align on: all clips by what will be aligned, as it is
NOISE_SEED = 50_000  # no other noise has seeds near it


def generated_clips(model, y, count, models, seed, cache, device):
    """`count` clips of each of the prompts y (N, S) by a velocity model, at the settings of `models` in turn: uint8
    (N, count, C, T, H, W). Made once and kept in the folder `cache`. BadInput if they cannot be kept."""
    made_from = hashlib.sha256(repr((y.tolist(), count, models, seed)).encode())
    for value in model.state_dict().values():
        made_from.update(value.numpy().tobytes())
    file = cache / f"generated-{made_from.hexdigest()[:16]}.pt"
    with process_0_first():  # which samples; the others then find the file
        try:
            kept = torch.load(file, weights_only=True)["clips"]
        except Exception:  # not there, or damaged: torch can raise anything
            model, clips = model.to(device), [None] * count
            for i, (name, settings) in enumerate(models.items()):
                places = range(i, count, len(models))
                rng = torch.Generator().manual_seed(NOISE_SEED + 100 * seed + i)
                x1 = torch.randn(len(places) * len(y), *model.config.video_shape, generator=rng)
                bar, asked = progress_bar(f"sampling {name}", "batch"), y.repeat(len(places), 1)
                videos = sample_many(model, x1.to(device), asked.to(device), bar, **settings)
                for place, video in zip(places, to_bytes(videos).cpu().split(len(y))):
                    clips[place] = video
            kept = torch.stack(clips, 1)
            save_checkpoint(file, {"clips": kept})
    return kept


def generated_pairs(
    count, splits, seed, path, config, cache, device, models=MODELS, most=MOST_CLIPS
):
    """As toy_pairs, of clips that a checkpoint's model generates for prompts of the named splits, at most `most` of
    each: `count` pairs without labels, and the attributes (count, 3) of their prompts. BadInput unless its clips have
    the sizes of `config` and its words are the toy's."""
    (model, words), rng = load_velocity(path), step_rng(seed, 0)
    needed = "the model to train (--generated 0 does without --init)"
    check_same_data("--init", model.config, words, needed, config, TOY_WORDS)
    prompts = world.split_prompts(*splits)
    prompts = prompts[torch.randperm(len(prompts), generator=rng)[:count]]
    each = min(most, max(2, len(models), math.ceil(2 * count / len(prompts))))
    which = torch.randint(len(prompts), (count,), generator=rng)
    first = torch.randint(each, (count,), generator=rng)
    second = (first + torch.randint(1, each, (count,), generator=rng)) % each
    chosen = torch.stack((first, second))  # (2, count)
    y = Vocabulary(words).encode_attributes(prompts, model.config.max_text)
    kept = generated_clips(model, y, each, models, seed, cache, device)

    def clips(index, side):
        return to_video(kept[which[index], chosen[side, index]])

    generator = len(world.GENERATORS) + chosen.T % len(models)  # (count, 2)
    clip_id = -1 - (which * each + chosen).T  # (count, 2); rendered clips count from 0 up
    return Pairs(y[which], clips, generator, clip_id=clip_id), prompts[which]


# ---------------------------------------------------------------------------------------------
# What a training asks for


def join_pairs(first, second):
    """The pairs of `first`, then those of `second`; both annotated, or neither."""

    def clips(index, side):
        sources = (first, index < len(first), 0), (second, index >= len(first), len(first))
        made = [
            (here, part.clips(index[here] - start, side[here]))
            for part, here, start in sources
            if here.any()
        ]
        videos = torch.empty(len(index), *made[0][1].shape[1:])
        for here, clip in made:
            videos[here] = clip
        return videos

    both = {
        f.name: (getattr(first, f.name), getattr(second, f.name))
        for f in fields(Pairs)
        if f.name != "clips"
    }
    return Pairs(
        clips=clips, **{n: torch.cat(values) for n, values in both.items() if values[0] is not None}
    )


def kinds_of_pairs(
    count, split, seed, config, vocabulary, device, generated, init, cache, labelled=True, **sampled
):
    """{kind: pairs}, annotated or not: a share `generated` of them compares clips of the base model
    `init`, `sampled` as generated_pairs takes it."""
    check_toy(config, vocabulary)
    num_generated, drawn = round(generated * count), {}
    if count > num_generated:
        drawn["rendered"] = toy_pairs(count - num_generated, [split], seed, config, vocabulary)
    if num_generated:
        drawn["generated"] = generated_pairs(
            num_generated, [split], seed, init, config, cache, device, **sampled
        )
    if not labelled:
        return {kind: pairs for kind, (pairs, _) in drawn.items()}
    bar = progress_bar("annotators look at the pairs", "x64 pairs")
    return {
        kind: annotate_pairs(*pairs_and_prompts, seed, bar)
        for kind, pairs_and_prompts in drawn.items()
    }


def mixed_pairs(*wanted, **settings):
    """The pairs of kinds_of_pairs as one set, the rendered ones first."""
    return reduce(join_pairs, kinds_of_pairs(*wanted, **settings).values())


def training_pairs(settings, config, vocabulary, device, labelled=True, **sampled):
    """settings.pairs pairs of training prompts, annotated unless nobody needs their labels."""
    return mixed_pairs(
        settings.pairs,
        "train",
        settings.seed,
        config,
        vocabulary,
        device,
        settings.generated,
        settings.init,
        settings.cache,
        labelled,
        **sampled,
    )


def held_pairs(settings, config, vocabulary, device):
    """{name: annotated pairs of prompts that no reward trains on}, settings.eval_pairs in all."""
    parts = kinds_of_pairs(
        settings.eval_pairs,
        "validation",
        settings.seed + 1,
        config,
        vocabulary,
        device,
        settings.generated,
        settings.init,
        settings.cache,
    )
    return {
        f"{kind} validation pairs, prompts never seen in training": pairs
        for kind, pairs in parts.items()
    }

"""The toy's data: clips to pretrain on, and labelled pairs (section 3.1).

Rendered clips come from the twelve generators of world.py. They are drawn first and rendered when
they are read. Generated clips are the base model's, sampled once and cached: every clip that people
compare in the paper is generated, and VideoReward is to judge generated clips. Three annotators and
a reviewer label the pairs.
"""

import hashlib
import math
from dataclasses import fields, replace

import torch

import world
from data import TOY_WORDS, Pairs, Vocabulary, step_rng
from model import load_velocity
from real_data.video import to_bytes, to_video
from runtime.checkpoint import check_same_data, save_checkpoint
from runtime.cli import BadInput, progress_bar
from runtime.distributed import process_0_first
from sample import sample_many

TOY_LENGTH = 5  # words of a toy prompt
MODELS = {  # generators beside the twelve: name -> settings of sample.sample
    "base": {},
    "base-cfg2": {"cfg": 2.0},
    "base-cfg0.5": {"cfg": 0.5},  # half-way to the model without a prompt: worse motion and text
    "base-6steps": {"steps": 6},
}
MOST_CLIPS = 40  # of each prompt: 71 MB for the training prompts
ON_POLICY = {"models": {"base": {}}, "most": 100}  # alignment takes the base model as it is
NOISE_SEED = 50_000  # no other noise has seeds near it


def check_toy(config, vocabulary):
    """BadInput unless the toy has clips and prompts for a model of this config and vocabulary."""
    if config.channels != 3:
        fault = f"this model takes latents, clips of shape {config.video_shape} (C, T, H, W)"
    elif isinstance(config.size, tuple):
        fault = "clips of {}x{} need --data: the toy renders square ones".format(*config.size)
    elif vocabulary.words != TOY_WORDS or config.max_text < TOY_LENGTH:
        fault = "this model does not know the toy's prompts"
    else:
        return
    raise BadInput(f"{fault}; give --data CSV (examples/toy_latents.py writes latents to try)")


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


def toy_pairs(count, splits, seed, config, vocabulary):
    """`count` unlabelled pairs: one prompt of the named splits, rendered by two generators.

    -> Pairs, attributes (count, 3) of their prompts."""
    rng = torch.Generator().manual_seed(seed)
    prompt = draw_prompts(count, splits, rng)
    models = len(world.GENERATORS)
    first = torch.randint(models, (count,), generator=rng)
    second = (first + torch.randint(1, models, (count,), generator=rng)) % models
    a = world.draw_clips(prompt, first, rng, config.frames)
    both = world.join(a, world.draw_clips(prompt, second, rng, config.frames))

    def clips(index, side):
        return world.render(both[index + side * count], config.size)

    y = vocabulary.encode_attributes(prompt, config.max_text)
    return Pairs(y, clips, torch.stack((first, second), 1)), prompt


def generated_pairs(
    count, splits, seed, path, config, cache, device, models=MODELS, most=MOST_CLIPS
):
    """`count` unlabelled pairs: one prompt of the named splits, two clips that the model of a
    checkpoint samples at the settings of `models`, at most `most` clips of each prompt.

    -> Pairs, attributes (count, 3) of their prompts. BadInput unless the model has the clip sizes
    of `config` and the toy's words."""
    model, words = load_velocity(path)
    needed = "the model to train (--generated 0 does without --init)"
    check_same_data("--init", model.config, words, needed, config, TOY_WORDS)
    rng = step_rng(seed, 0)
    prompts = world.split_prompts(*splits)
    prompts = prompts[torch.randperm(len(prompts), generator=rng)[:count]]
    each = min(most, max(2, len(models), math.ceil(2 * count / len(prompts))))
    which = torch.randint(len(prompts), (count,), generator=rng)
    first = torch.randint(each, (count,), generator=rng)
    second = (first + torch.randint(1, each, (count,), generator=rng)) % each
    chosen = torch.stack((first, second))  # (2, count)
    y = Vocabulary(words).encode_attributes(prompts, model.config.max_text)
    cached = generated_clips(model, y, each, models, seed, cache, device)

    def clips(index, side):
        return to_video(cached[which[index], chosen[side, index]])

    generator = len(world.GENERATORS) + chosen.T % len(models)  # (count, 2)
    clip_id = -1 - (which * each + chosen).T  # (count, 2); those of rendered clips start at 0
    return Pairs(y[which], clips, generator, clip_id=clip_id), prompts[which]


def generated_clips(model, y, count, models, seed, cache, device):
    """`count` clips of each prompt of y (N, S), at the settings of `models` in turn: uint8
    (N, count, C, T, H, W). They are sampled once and stored in the folder `cache`."""
    digest = hashlib.sha256(repr((y.tolist(), count, models, seed)).encode())
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    file = cache / f"generated-{digest.hexdigest()[:16]}.pt"
    with process_0_first():
        try:
            return torch.load(file, weights_only=True)["clips"]
        except Exception:  # not there, or damaged: torch can raise anything
            pass
        model, clips = model.to(device), [None] * count
        for i, (name, settings) in enumerate(models.items()):
            places = range(i, count, len(models))
            rng = torch.Generator().manual_seed(NOISE_SEED + 100 * seed + i)
            x1 = torch.randn(len(places) * len(y), *model.config.video_shape, generator=rng)
            all_y = y.repeat(len(places), 1)
            bar = progress_bar(f"sampling {name}", "batch")
            videos = sample_many(model, x1.to(device), all_y.to(device), bar, **settings)
            for place, video in zip(places, to_bytes(videos).cpu().split(len(y))):
                clips[place] = video
        clips = torch.stack(clips, 1)
        save_checkpoint(file, {"clips": clips})
    return clips


def annotate_pairs(pairs, prompt, seed, progress=lambda chunks: chunks):
    """Pairs of clips of toy prompts (count, 3) with the annotators' labels and ratings."""
    scores = []
    for index in progress(torch.arange(len(pairs)).split(64)):
        scores.append([world.oracle(video, prompt[index]) for video in pairs.sides(index)])
    a, b = (torch.cat(side) for side in zip(*scores))
    rng = torch.Generator().manual_seed(seed + 1)
    label, _ = world.annotate(a, b, rng)
    overall, mos = world.annotate_overall(a, b, rng), world.rate(a, b, rng)
    return replace(pairs, truth=torch.stack((a, b), 1), label=label, mos=mos, overall=overall)


def annotated_pairs(count, splits, seed, config, vocabulary):
    """`count` annotated pairs of rendered clips."""
    return annotate_pairs(*toy_pairs(count, splits, seed, config, vocabulary), seed)


def join_pairs(first, second):
    """The pairs of `first`, then those of `second`; both annotated, or neither."""

    def clips(index, side):
        one = index < len(first)
        two = ~one
        a = first.clips(index[one], side[one])
        b = second.clips(index[two] - len(first), side[two])
        order = torch.cat((one.nonzero(), two.nonzero()))[:, 0]
        return torch.cat((a, b))[order.argsort()]

    joined = {}
    for each in fields(Pairs):
        value = getattr(first, each.name)
        if torch.is_tensor(value):
            joined[each.name] = torch.cat((value, getattr(second, each.name)))
    return Pairs(clips=clips, **joined)


def kinds_of_pairs(
    count, split, seed, config, vocabulary, device, generated, init, cache, labelled=True, **sampled
):
    """{kind: pairs}: a share `generated` of them compares clips of the base model `init`, `sampled`
    as generated_pairs takes it."""
    check_toy(config, vocabulary)
    num_generated, kinds = round(generated * count), {}
    if count > num_generated:
        kinds["rendered"] = toy_pairs(count - num_generated, [split], seed, config, vocabulary)
    if num_generated:
        where = (init, config, cache, device)
        kinds["generated"] = generated_pairs(num_generated, [split], seed, *where, **sampled)
    for kind, (pairs, prompt) in kinds.items():
        if labelled:
            bar = progress_bar("annotators look at the pairs", "x64 pairs")
            pairs = annotate_pairs(pairs, prompt, seed, bar)
        kinds[kind] = pairs
    return kinds


def mixed_pairs(*args, **settings):
    """The pairs of kinds_of_pairs as one set, the rendered ones first."""
    first, *others = kinds_of_pairs(*args, **settings).values()
    return join_pairs(first, *others) if others else first


def training_pairs(settings, config, vocabulary, device, labelled=True, **sampled):
    """settings.pairs pairs of training prompts, annotated if `labelled`."""
    where = (config, vocabulary, device, settings.generated, settings.init, settings.cache)
    return mixed_pairs(settings.pairs, "train", settings.seed, *where, labelled, **sampled)


def held_pairs(settings, config, vocabulary, device):
    """{name: annotated pairs of prompts that no reward trains on}, settings.eval_pairs in all."""
    where = (config, vocabulary, device, settings.generated, settings.init, settings.cache)
    kinds = kinds_of_pairs(settings.eval_pairs, "validation", settings.seed + 1, *where)
    prompts = "prompts never seen in training"
    return {f"{kind} validation pairs, {prompts}": pairs for kind, pairs in kinds.items()}

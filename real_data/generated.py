"""The base model as four more generators of the toy: its own clips, sampled once and cached.

Every clip that people compare in the paper is generated (section 3.1), and VideoReward is to judge
generated clips. So a share of its pairs compares clips that the base model samples of one toy
prompt, at the settings of MODELS. Held-out prompts and other settings give pairs to judge it by.
"""

import hashlib
import math
from dataclasses import fields

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

MODELS = {  # name -> settings of sample.sample
    "base": {},
    "base-cfg2": {"cfg": 2.0},
    "base-cfg0.5": {"cfg": 0.5},  # half-way to the model without a prompt: worse motion and text
    "base-6steps": {"steps": 6},
}
MOST_CLIPS = 40  # of each prompt: 71 MB for the training prompts
ON_POLICY = {"models": {"base": {}}, "most": 100}  # alignment takes the base model as it is
NOISE_SEED = 50_000  # no other noise has seeds near it


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


def generated_pairs(
    count, splits, seed, path, config, cache, device, models=MODELS, most=MOST_CLIPS
):
    """`count` pairs of clips that a checkpoint's model generates, without labels, and the
    attributes (count, 3) of their prompts: those of the named splits, at most `most` clips of each.

    BadInput unless the model has the clip sizes of `config` and the toy's words."""
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


# ---------------------------------------------------------------------------------------------
# The pairs of a training


def join_pairs(first, second):
    """The pairs of `first`, then those of `second`; both annotated, or neither."""

    def clips(index, side):
        is_first = index < len(first)
        if is_first.all():
            return first.clips(index, side)
        if not is_first.any():
            return second.clips(index - len(first), side)
        of_first = first.clips(index[is_first], side[is_first])
        videos = torch.empty(len(index), *of_first.shape[1:])
        videos[is_first] = of_first
        videos[~is_first] = second.clips(index[~is_first] - len(first), side[~is_first])
        return videos

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
    num_generated, drawn = round(generated * count), {}
    if count > num_generated:
        drawn["rendered"] = toy_pairs(count - num_generated, [split], seed, config, vocabulary)
    if num_generated:
        where = (init, config, cache, device)
        drawn["generated"] = generated_pairs(num_generated, [split], seed, *where, **sampled)
    if not labelled:
        return {kind: pairs for kind, (pairs, _) in drawn.items()}
    bar = progress_bar("annotators look at the pairs", "x64 pairs")
    return {
        kind: annotate_pairs(pairs, prompt, seed, bar) for kind, (pairs, prompt) in drawn.items()
    }


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

"""Where a task's pairs come from: the toy world, whose annotators label what they see, or a CSV given by --data.

What --data means to each algorithm: reward and nrg learn its labels; pretrain takes both clips of every pair with their
prompt; sft, rwr and dpo take the clips and let VideoReward label them anew, as the paper does. Where a model is trained
from nothing its vocabulary and, with latents for clips, its channels, frames and size follow the data.
"""

from dataclasses import fields, replace

import torch

from common import BadInput, progress_bar
from data import Vocabulary, annotated_pairs, disk_pairs, read_pairs, split_words, step_rng, vocabulary_of
from model import PRESETS
from reward import RewardConfig
from video import is_latent, read_latent

MOST_WORDS = 128  # of a real prompt; the paper's are about 100 words long


def reward_config(args, config):
    """A VideoReward's sizes beside a model's of `config`: three quarters of its width and two thirds of its depth."""
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    sizes |= {"dim": config.dim * 3 // 4, "depth": config.depth * 2 // 3}
    return RewardConfig(**sizes, separate=args.tokens == "separate")


def epoch_index(count, batch, step, seed):
    """Indices (batch,) of step `step` in epochs that are each a new permutation of `count` items."""
    position = torch.arange(step * batch, (step + 1) * batch)
    index = torch.empty_like(position)
    for epoch in (position // count).unique().tolist():
        here = position // count == epoch
        index[here] = torch.randperm(count, generator=step_rng(seed, -1 - epoch))[position[here] % count]
    return index


def toy_data(args, config, vocabulary):
    """(pairs to train on, a function that makes pairs to judge by, the latter's name), the toy world's."""
    bar = progress_bar("annotators look at the pairs", "x64 pairs")
    pairs = annotated_pairs(args.pairs, ["train"], args.seed, config, vocabulary, bar)

    def held():
        return annotated_pairs(args.eval_pairs, ["validation"], args.seed + 1, config, vocabulary)

    return pairs, held, "validation pairs, prompts never seen in training"


def latent_sizes(args, row):
    """Channels, frames and size of the first clip of --data where it is a latent: those of a model made for it."""
    if not is_latent(row.path_a):
        return {}
    where = f"{args.data}, line {row.line}, column path_A: latent {row.path_a}"
    try:
        channels, frames, height, width = read_latent(args.data.parent / row.path_a).shape
    except (ValueError, OSError) as error:
        raise BadInput(f"{where} {error}") from None
    if height != width:
        raise BadInput(f"{where} is {height} high and {width} wide; a square one is needed")
    return {"channels": channels, "frames": frames, "size": height}


def disk_data(args, model=None, held_out=True):
    """(vocabulary, config, pairs to train on, pairs to judge by, the latter's name) from --data and --val; without
    --val a tenth of the prompts is held out. `model` = (words, config) of a model that is there already; otherwise both
    are made for the data. Without `held_out` all pairs of --data are trained on."""
    skipped = [] if args.skip_bad else None
    rows = read_pairs(args.data, skipped)
    if args.algo == "reward" and args.loss == "regression" and not any(any(row.mos) for row in rows):
        raise BadInput(f"{args.data}: --loss regression needs ratings, the columns MOS_A_VQ to MOS_B_TA")
    prompts = sorted({row.prompt for row in rows})
    if model:
        vocabulary, config = Vocabulary(model[0]), model[1]
    else:
        vocabulary = vocabulary_of(prompts)
        longest = max(len(split_words(prompt)) for prompt in prompts)
        sizes = {"vocab": len(vocabulary.words), "max_text": min(longest, MOST_WORDS), **latent_sizes(args, rows[0])}
        config = replace(PRESETS[args.preset], **sizes)

    def load(rows, path):
        bar = progress_bar(f"decoding {path.name}", "video")
        return disk_pairs(rows, path, config, vocabulary, args.cache, skipped, bar)

    held, name, out = None, "", set()
    if held_out and args.val:
        held, name = load(read_pairs(args.val, skipped), args.val), f"pairs of {args.val}"
    elif held_out:
        order = torch.randperm(len(prompts), generator=step_rng(args.seed, -1)).tolist()
        out = {prompts[i] for i in order[: max(1, len(prompts) // 10)]} if len(prompts) > 1 else set()
        held = load([row for row in rows if row.prompt in out] or rows, args.data)
        name = "pairs of prompts held out of training" if out else "training pairs, all there are of one prompt"
    pairs = load([row for row in rows if row.prompt not in out], args.data)
    if skipped:
        print(f"skipped {len(skipped)} rows or videos: {skipped[0]}" + ("; ..." if skipped[1:] else ""))
    return vocabulary, config, pairs, held, name

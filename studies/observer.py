"""What a clip under noise still shows, and what a noise-aware reward sees of it (section 4.4).

A reward can steer only by what it sees in x_t. Readers score the same noised clips, of prompts that
no reward was trained on: does a clip show its own colour, shape or direction, or another one?

    ideal      Bayes over renders, p(a | x_t) in a known world: the ceiling of every reader
    probe k    ridge regression on the base model's tokens after k blocks, by place
    a reward   its TA for the clip's own prompt against a prompt with another word

Where a reward stays below the probe, its head is at fault; where the probe stays below the ceiling,
the trunk is. Where the ceiling falls, nothing can be known and guidance should not begin. A model
of real videos has no known ceiling; there the probe shows which blocks a reward should read, and
from which t."""

import torch
import torch.nn.functional as F

import world
from data import DIMENSIONS, Vocabulary, step_rng
from flow import interpolate
from judge import prompt_set
from model import load_velocity
from runtime.checkpoint import WEIGHTS

TIMES = (0.0, 0.4, 0.6, 0.8, 0.9, 0.95)
BLOCKS = (2, 4)
KNOWN = 4000  # renders that the ideal observer knows
LEARNED = 2000  # renders that a probe learns from
RIDGE = 0.1  # beside a Gram matrix whose diagonal is 1 on average


def clean_clips(count, splits, rng):
    """Renders (count, C, T, H, W) that show every attribute, and their attributes (count, 3)."""
    prompts = prompt_set(count, *splits)
    generator = torch.zeros_like(prompts[:, 0])
    return world.render(world.draw_clips(prompts, generator, rng, clean=True)), prompts


def noised(x0, time, rng):
    """x_t and t (N,) of clips at one time."""
    t = torch.full((len(x0),), time)
    return interpolate(x0, torch.randn(x0.shape, generator=rng), t), t


def told_apart(reader, seed, count):
    """Rows, one for each of TIMES: the share of clips for which a reader scores the clip's own
    prompt above one with another colour, shape or direction. One seed, the same clips.

    reader: (x_t, t, rng) -> a function from prompts (N, 3) to scores (N,)."""
    rng = step_rng(seed, 0)
    x0, own = clean_clips(count, ["validation"], rng)
    others = []
    for i, choices in enumerate(world.CHOICES):
        other = own.clone()
        other[:, i] = (own[:, i] + torch.randint(1, choices, (count,), generator=rng)) % choices
        others.append(other)
    rows = []
    for time in TIMES:
        score = reader(*noised(x0, time, rng), step_rng(seed, 1))
        row = {"study": "told", "t": time, "seed": seed}
        for name, other in zip(world.MARGIN, others):
            row[name] = (score(own) > score(other)).float().mean().item()
        rows.append(row)
    return rows


def scores_of(values):
    """Prompts (N, 3) -> scores (N,): the sum over attributes of `values`, three tensors (N,
    choices)."""

    def score(prompts):
        return sum(value.gather(1, prompts[:, [i]])[:, 0] for i, value in enumerate(values))

    return score


def ideal(x_t, t, rng):
    """log p(attribute | x_t), each attribute by itself, if KNOWN renders were all clips there
    are."""
    x0, attributes = clean_clips(KNOWN, ("train", "validation", "hard"), rng)
    mean = ((1 - t[0]) * x0).flatten(1).double()
    x = x_t.flatten(1).double()
    variance = t[0].double().clamp(min=0.02) ** 2
    log_p = (x @ mean.T - 0.5 * mean.square().sum(1)) / variance  # (N, KNOWN), up to a constant
    values = []
    for i, choices in enumerate(world.CHOICES):
        each = [log_p[:, attributes[:, i] == a].logsumexp(1) for a in range(choices)]
        values.append(torch.stack(each, 1))
    return scores_of(values)


@torch.no_grad()
def probe(base, blocks, x_t, t, rng):
    """Ridge regression of the attributes on the base model's tokens after `blocks` blocks, without
    a prompt."""
    max_text = base.config.max_text

    def tokens(x_t):
        parts = []
        for x in x_t.split(128):
            no_prompt = torch.zeros(len(x), max_text, dtype=torch.int64)
            hidden, condition = base.embed(x, t[:1].expand(len(x)), no_prompt)
            hidden = base.run(hidden, condition, 0, blocks)
            parts.append(hidden[:, max_text:].flatten(1))
        return torch.cat(parts)

    x0, attributes = clean_clips(LEARNED, ["train"], rng)
    x_train, _ = noised(x0, t[0].item(), rng)
    train, test = tokens(x_train), tokens(x_t)  # (LEARNED, tokens * d), (N, tokens * d)
    mean, std = train.mean(0), train.std(0).clamp(min=1e-3)
    train, test = (train - mean) / std, (test - mean) / std
    gram = train @ train.T / train.shape[1] + RIDGE * torch.eye(LEARNED)
    values = []
    for i, choices in enumerate(world.CHOICES):
        target = F.one_hot(attributes[:, i], choices).float()
        weights = torch.linalg.solve(gram, target - target.mean(0))
        values.append(test @ train.T / train.shape[1] @ weights)
    return scores_of(values)


def alignment(reward, words, device, x_t, t, rng):
    """TA of a noise-aware reward."""
    x_t, t = x_t.to(device), t.to(device)

    @torch.no_grad()
    def score(prompts):
        y = Vocabulary(words).encode_attributes(prompts, reward.config.max_text).to(device)
        return reward(x_t, t, y)[:, DIMENSIONS.index("TA")].cpu()

    return score


def audited(seed, count):
    """Rows of the readers that are no reward."""
    base, _ = load_velocity(WEIGHTS / "base.pt")
    rows = [row | {"variant": "ideal"} for row in told_apart(ideal, seed, count)]
    for blocks in BLOCKS:

        def reader(x_t, t, rng, blocks=blocks):
            return probe(base, blocks, x_t, t, rng)

        rows += [row | {"variant": f"probe {blocks}"} for row in told_apart(reader, seed, count)]
    return rows

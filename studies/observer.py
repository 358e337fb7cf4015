"""What a clip under noise still shows, and what a reward sees of it: the audit of a noise-aware reward (section 4.4).

A reward can steer only by what it sees in x_t. Readers of the same noised clips, of prompts that no reward was trained
on, are asked whether a clip shows its own colour, shape or direction rather than another one:

    ideal      Bayes over renders, p(a | x_t) in a known world: the ceiling of every reader
    probe k    ridge regression on the base model's tokens after k blocks, by place: what a head could read there
    a reward   its TA for the clip's own prompt against the one with another word

Where a reward stays below the probe, its head is at fault; where the probe stays below the ceiling, the trunk; and
where the ceiling falls, nothing can be known and guidance should not begin. On a model of real videos, where no ceiling
is known, the probe answers what the reward should read, and from which t on.
"""

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
ASKED, KNOWN, LEARNED = (
    256,
    4000,
    2000,
)  # clips that are read; renders that Bayes knows, and that a probe learns from
RIDGE = 0.1  # beside a Gram matrix whose diagonal is 1 on average


def clean_clips(count, splits, rng):
    """Renders (count, C, T, H, W) in which every attribute can be seen, and their attributes (count, 3)."""
    prompts = prompt_set(count, *splits)
    return world.render(
        world.draw_clips(prompts, torch.zeros_like(prompts[:, 0]), rng, clean=True)
    ), prompts


def noised(x0, now, rng):
    """x_t and t (N,) of clips at one time."""
    t = torch.full((len(x0),), now)
    return interpolate(x0, torch.randn(x0.shape, generator=rng), t), t


def told_apart(reader, seed, count=ASKED):
    """Rows, one for each of TIMES: the share of clips for which `reader`, (x_t, t, rng) -> (prompts (N, 3) -> scores
    (N,)), puts the clip's own prompt above one with another colour, shape or direction. One seed, the same clips."""
    rng = step_rng(seed, 0)
    x0, own = clean_clips(count, ["validation"], rng)
    others = []
    for i, choices in enumerate(world.CHOICES):
        others.append(own.clone())
        others[i][:, i] = (own[:, i] + torch.randint(1, choices, (count,), generator=rng)) % choices
    rows = []
    for now in TIMES:
        score = reader(*noised(x0, now, rng), step_rng(seed, 1))
        shares = [(score(own) > score(other)).float().mean().item() for other in others]
        rows.append({"study": "told", "t": now, "seed": seed, **dict(zip(world.MARGIN, shares))})
    return rows


def scores_of(values):
    """Prompts (N, 3) -> scores (N,): the sum of what each attribute has, `values` [(N, choices)] for the three."""
    return lambda prompts: sum(
        value.gather(1, prompts[:, i : i + 1])[:, 0] for i, value in enumerate(values)
    )


def ideal(x_t, t, rng):
    """log p(attribute | x_t), each attribute by itself, were KNOWN renders all that there is."""
    x0, shown = clean_clips(KNOWN, ("train", "validation", "hard"), rng)
    mean, seen = ((1 - t[0]) * x0).flatten(1).double(), x_t.flatten(1).double()
    log_p = (seen @ mean.T - 0.5 * mean.square().sum(1)) / t[0].double().clamp(
        min=0.02
    ) ** 2  # (N, KNOWN) + constant
    return scores_of(
        [
            torch.stack([log_p[:, shown[:, i] == a].logsumexp(1) for a in range(choices)], 1)
            for i, choices in enumerate(world.CHOICES)
        ]
    )


@torch.no_grad()
def probe(base, blocks, x_t, t, rng):
    """Ridge regression of the attributes on the tokens after so many blocks, without a prompt."""

    def tokens(x_t):
        parts = []
        for x in x_t.split(128):
            no_prompt = torch.zeros(len(x), base.config.max_text, dtype=torch.int64)
            hidden, condition = base.embed(x, t[:1].expand(len(x)), no_prompt)
            parts.append(
                base.run(hidden, condition, 0, blocks)[:, base.config.max_text :].flatten(1)
            )
        return torch.cat(parts)

    x0, shown = clean_clips(LEARNED, ["train"], rng)
    learned = tokens(noised(x0, t[0].item(), rng)[0])  # (LEARNED, tokens * d)
    mean, std = learned.mean(0), learned.std(0).clamp(min=1e-3)
    learned, read = (learned - mean) / std, (tokens(x_t) - mean) / std
    gram = learned @ learned.T / learned.shape[1] + RIDGE * torch.eye(LEARNED)
    near, values = read @ learned.T / learned.shape[1], []
    for i, choices in enumerate(world.CHOICES):
        target = F.one_hot(shown[:, i], choices).float()
        values.append(near @ torch.linalg.solve(gram, target - target.mean(0)))
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
    readers = {"ideal": ideal}
    for blocks in BLOCKS:
        readers[f"probe {blocks}"] = lambda x_t, t, rng, blocks=blocks: probe(
            base, blocks, x_t, t, rng
        )
    return [
        row | {"variant": name}
        for name, reader in readers.items()
        for row in told_apart(reader, seed, count)
    ]

"""What can be told of a clip under noise, and what is told: the audit of a noise-aware reward (paper, section 4.4).

A reward can only steer by what it sees in x_t. Three readers of the same noised clips say which of an attribute's two
values a clean clip shows, its own or another one, with the other attributes unknown:

    ideal       Bayes over renders: p(a | x_t) of a known world, the ceiling of every reader
    probe k     ridge regression on the base model's tokens after k blocks, by place, without a prompt: what a head
                could read there
    reward      TA for the own prompt against the one with the other value

Where the reward stays below the probe its head is at fault; where the probe stays below the ceiling, the trunk; and
where the ceiling falls, guidance cannot know better. The clips show prompts that no reward was trained on.
"""

from functools import partial

import torch

import world
from data import DIMENSIONS, Vocabulary, step_rng
from evaluate import over_seeds, prompt_set
from flow import interpolate
from model import load_velocity
from nrg import load_noisy_reward
from runtime.checkpoint import WEIGHTS
from studies.jobs import ATTRIBUTES
from studies.report.charts import Chart
from studies.report.tables import Table, plus_minus

TIMES = (0.0, 0.4, 0.6, 0.8, 0.9, 0.95)
PROBED = (2, 4)  # blocks
RENDERS, JUDGED = 4000, 512
RIDGE = 10.0


def renders(count, splits, seed, config):
    """Clean clips (count, ...) and the attributes (count, 3) that they show."""
    prompts, rng = prompt_set(count, *splits), step_rng(seed, 0)
    return world.render(
        world.draw_clips(prompts, torch.zeros_like(prompts[:, 0]), rng, clean=True), config.size
    ), prompts


def noised(x0, t, seed):
    """x_t of clips at one t, and t for each."""
    t = torch.full((len(x0),), t)
    return interpolate(x0, torch.randn(x0.shape, generator=step_rng(seed, 1)), t), t


def ideal(x_t, t, known, shown):
    """log p(attribute | x_t), [(N, choices)] for the three, from renders `known` (M, ...) that show `shown` (M, 3)."""
    x_t, known, var = x_t.flatten(1), (1 - t[0]) * known.flatten(1), t[0].clamp(min=0.02) ** 2
    log_p = (x_t @ known.T - 0.5 * known.square().sum(1)) / var  # of x_t given a render, what all share left out
    of = [[log_p[:, shown[:, i] == a].logsumexp(1) for a in range(choices)] for i, choices in enumerate(world.CHOICES)]
    return [torch.stack(values, 1) for values in of]


@torch.no_grad()
def probe(base, depth, x_t, t, known, shown, seed):
    """The same by ridge regression on tokens after `depth` blocks, learned on renders noised to the same t."""

    def tokens(x_t):
        t_all, words = t[0].expand(len(x_t)), torch.zeros(len(x_t), base.config.max_text, dtype=torch.int64)
        hidden = [
            base.features(*part, depth)[:, base.config.max_text :].flatten(1)
            for part in zip(x_t.split(128), t_all.split(128), words.split(128))
        ]
        return torch.cat(hidden)

    features = tokens(noised(known, t[0].item(), seed + 1)[0])
    mean, std = features.mean(0), features.std(0).clamp(min=1e-3)
    features, asked = (features - mean) / std, (tokens(x_t) - mean) / std
    gram = features @ features.T / features.shape[1]
    scores = []
    for i, choices in enumerate(world.CHOICES):
        target = torch.nn.functional.one_hot(shown[:, i], choices).float()
        dual = torch.linalg.solve(gram + RIDGE * torch.eye(len(gram)) / 100, target - target.mean(0))
        scores.append(asked @ features.T / features.shape[1] @ dual)
    return scores


@torch.no_grad()
def alignment(reward, words, x_t, t, prompts):
    """TA (N,) of a noise-aware reward for attributes (N, 3)."""
    y = Vocabulary(words).encode_attributes(prompts, reward.config.max_text)
    return reward(x_t, t, y)[:, DIMENSIONS.index("TA")]


def audited(seed, args, device):
    """Rows of all readers for one draw of clips, noise and other values."""
    base, words = load_velocity(WEIGHTS / "base.pt")
    reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt")
    known, shown = renders(RENDERS, ("train", "validation", "hard"), 10 * seed, base.config)
    x0, own = renders(min(JUDGED, args.eval_pairs), ("validation", "hard"), 10 * seed + 5, base.config)
    rng, rows = step_rng(10 * seed, 2), []
    other = [(own[:, i] + torch.randint(1, n, (len(own),), generator=rng)) % n for i, n in enumerate(world.CHOICES)]
    for now in TIMES:
        x_t, t = noised(x0, now, 10 * seed)
        readers = {"ideal": ideal(x_t, t, known, shown)}
        readers |= {f"probe {k}": probe(base, k, x_t, t, known[:2000], shown[:2000], 10 * seed) for k in PROBED}
        told = {
            name: [
                (s.gather(1, own[:, i : i + 1]) > s.gather(1, other[i][:, None]))[:, 0] for i, s in enumerate(scores)
            ]
            for name, scores in readers.items()
        }
        said = alignment(reward, words, x_t, t, own)
        told["reward"] = []
        for i in range(3):
            asked = own.clone()
            asked[:, i] = other[i]
            told["reward"].append(said > alignment(reward, words, x_t, t, asked))
        for name, right in told.items():
            shares = (value.float().mean().item() for value in right)
            rows.append({"reader": name, "t": now, "seed": seed, **dict(zip(ATTRIBUTES, shares))})
    return rows


def folder(args):
    return f"observer-{args.eval_pairs}"


def jobs(args, device):
    return {f"audit-{seed}": partial(audited, seed, args, device) for seed in range(args.seeds)}


def report(args, rows):
    figure, tables, charts = partial(over_seeds, rows), [], []
    readers = list(dict.fromkeys(row["reader"] for row in rows))
    for name in ATTRIBUTES:
        curves = {reader: [figure(name, reader=reader, t=t) for t in TIMES] for reader in readers}
        cells = [[reader, *map(plus_minus, curve)] for reader, curve in curves.items()]
        tables.append(Table(f"{name}: own value told from another", ["reader", *(f"t {t:g}" for t in TIMES)], cells))
        series = [(reader, TIMES, *zip(*curve)) for reader, curve in curves.items()]
        charts.append(Chart(name, series, "t", "told apart", level=0.5))
    return {
        "rows": rows,
        "title": "What can be told under noise",
        "introduction": [f"Clean clips of unseen prompts, mean ± sd over {args.seeds} draws of clips and noise."],
        "tables": tables,
        "pictures": {"observer": charts},
    }

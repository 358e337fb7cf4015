"""What the three algorithms have in common (paper, sections 4.1 and 4.4, Eq. 3, 7 and 10), where the answer is known.

All three aim at p* = p_ref exp(r / beta) / Z (Eq. 7), the best trade of reward against KL from the reference. Here
p_ref is a mixture of two Gaussians on a line and r(x) = x, so p* is the same mixture tilted: each mode moves up by its
variance / beta, and their masses change by exp(mean / beta). The reference's velocity is known too; a policy is it
plus a small network that starts at zero.

    rwr            samples of p_ref weighted by exp(r / beta): its optimum is p* itself
    dpo-B          pairs of p_ref, labelled by Bradley-Terry on r / beta, with B for the loss's own beta
    nrg-exact      guidance by the exact value function log E[exp(r(x0) / beta) | x_t]
    nrg-shared     guidance by a reward learned from such pairs, both samples with the same noise (section 4.4)
    nrg-own        the same, each sample with noise of its own

With the same noise for both, x_t^w - x_t^l = (1 - t) (w - l): the noise cancels, Bradley-Terry finds the score
x_t / (1 - t) / beta, and its gradient grows towards the noise where that of the value function falls to 0. With noise
of their own a score can only say what x_t tells of x0, and that is close to the value.
"""

from functools import partial

import torch

from data import draw_noise, step_rng
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from judge import over_seeds
from nrg import guide, noisy_pair_step
from sample import sample
from studies.report.charts import Chart
from studies.report.tables import Table, plus_minus

MEANS, STD = torch.tensor([-1.0, 1.0]), 0.4  # of the two modes, equally likely
BETA = 1.0  # of Eq. 3
DPO_BETAS = (0.3, 1.0, 3.0)
STEPS, BATCH, RATE = 800, 256, 3e-3
SAMPLES, EULER = 10_000, 100
EDGES = torch.linspace(-3, 4, 71)


def posterior(x_t, t, tilt=0.0):
    """Of x0 given x_t (B, 1) at t (B,), under p_ref exp(tilt x0): responsibilities (B, 2), means (B, 2), and the log of
    E[exp(tilt x0) | x_t] under p_ref (B,)."""
    t = t[:, None]
    seen = (1 - t) ** 2 * STD**2 + t**2  # variance of x_t within a mode
    mean = MEANS + (1 - t) * STD**2 / seen * (x_t - (1 - t) * MEANS)  # (B, 2)
    variance = STD**2 * t**2 / seen  # (B, 1)
    log_weight = -0.5 * (x_t - (1 - t) * MEANS) ** 2 / seen
    log_tilted = log_weight + tilt * mean + 0.5 * tilt**2 * variance
    value = torch.logsumexp(log_tilted, 1) - torch.logsumexp(log_weight, 1)
    return torch.softmax(log_tilted, 1), mean + tilt * variance, value


def reference(x_t, t, y):
    """v_ref = E[x1 - x0 | x_t] = (x_t - E[x0 | x_t]) / t."""
    weight, mean, _ = posterior(x_t, t)
    return (x_t - (weight * mean).sum(1, keepdim=True)) / t.clamp(min=1e-3)[:, None]


class Small(torch.nn.Module):
    """A network (x_t, t) -> one number that starts at zero; added to the reference's velocity if it is a policy."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        sizes = (2, 64), (64, 64), (64, 1)
        layers = [layer for size in sizes for layer in (torch.nn.Linear(*size), torch.nn.SiLU())]
        self.net = torch.nn.Sequential(*layers[:-1])
        torch.nn.init.zeros_(self.net[-1].weight)
        torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_t, t, y):
        out = self.net(torch.cat((x_t, t[:, None]), 1))
        return reference(x_t, t, y) + out if self.policy else out


def draw(count, rng):
    """Samples (count, 1) of p_ref."""
    mode = torch.randint(2, (count,), generator=rng)
    return (MEANS[mode] + STD * torch.randn(count, generator=rng))[:, None]


def fit(network, loss, seed):
    """Trains with loss (rng) -> scalar, the rate falling to zero."""
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss(step_rng(seed, step)).backward()
        optimizer.step()
    return network.eval()


def labelled_pairs(rng):
    """Winner and loser (BATCH, 1): drawn from p_ref, decided by Bradley-Terry on r / beta."""
    a, b = draw(BATCH, rng), draw(BATCH, rng)
    first = torch.rand(BATCH, 1, generator=rng) < torch.sigmoid((a - b) / BETA)
    return torch.where(first, a, b), torch.where(first, b, a)


NO_PROMPT = torch.zeros(BATCH, 1, dtype=torch.int64)


def model_of(method, seed):
    """(velocity, guidance) of a method."""
    torch.manual_seed(seed)
    if method == "reference":
        return reference, None
    if method == "rwr":
        data = draw(20_000, step_rng(seed, -2))
        weight = rwr_weights(data[:, 0], BETA)

        def loss(rng):
            some = torch.randint(len(data), (BATCH,), generator=rng)
            return flow_rwr_step(
                policy, data[some], NO_PROMPT, weight[some], **draw_noise(BATCH, (1,), 1.0, rng)
            )[0]

        policy = Small(policy=True)
        return fit(policy, loss, seed), None
    if method.startswith("dpo"):

        def loss(rng):
            pair, noise = labelled_pairs(rng), draw_noise(BATCH, (1,), 1.0, rng)
            return flow_dpo_step(
                policy, reference, *pair, NO_PROMPT, **noise, beta=float(method[4:])
            )[0]

        policy = Small(policy=True)
        return fit(policy, loss, seed), None
    if method == "nrg-exact":

        def value(x_t, t, y):
            return posterior(x_t, t, 1 / BETA)[2][:, None]

        return reference, guide(value, [1.0])

    def loss(rng):
        pair = *labelled_pairs(rng), NO_PROMPT, torch.ones(BATCH, 3, dtype=torch.int64)
        noise = draw_noise(BATCH, (1,), 1.0, rng)
        if method == "nrg-own":
            noise["x1_b"] = torch.randn(BATCH, 1, generator=rng)
        return noisy_pair_step(lambda *x: learned(*x).expand(-1, 3), *pair, **noise)[0]

    learned = Small(policy=False)
    return reference, guide(fit(learned, loss, seed), [1.0])


def below(x):
    """The distribution function of p* at x (N,)."""
    normal = torch.distributions.Normal(MEANS + STD**2 / BETA, STD)
    return (normal.cdf(x[:, None]) * torch.softmax(MEANS / BETA, 0)).sum(1)


def truth():
    """p* in the bins of EDGES, and its mean."""
    return below(EDGES).diff(), (
        torch.softmax(MEANS / BETA, 0) * (MEANS + STD**2 / BETA)
    ).sum().item()


def quantiles(count):
    """`count` evenly spaced ones of p*, from the lowest."""
    line = torch.linspace(-4, 4, 100_001)
    return line[torch.searchsorted(below(line), (torch.arange(count) + 0.5) / count)]


def judged(method, seed):
    velocity, guidance = model_of(method, seed)
    x1 = torch.randn(SAMPLES, 1, generator=step_rng(seed, -1))
    y = torch.zeros(SAMPLES, 1, dtype=torch.int64)
    x0 = sample(velocity, x1, y, steps=EULER, shift=1.0, guidance=guidance)[:, 0]
    share = torch.histogram(x0, EDGES).hist / SAMPLES
    # the first Wasserstein distance, the area between the two distribution functions, is that of samples in order
    distance = (x0.sort().values - quantiles(SAMPLES)).abs().mean().item()
    facts = {
        "distance": distance,
        "mean": x0.mean().item(),
        "right": (x0 > 0).float().mean().item(),
    }
    return [{"method": method, "seed": seed, **facts, "histogram": share.tolist()}]


METHODS = (
    "reference",
    "rwr",
    *(f"dpo-{beta:g}" for beta in DPO_BETAS),
    "nrg-exact",
    "nrg-shared",
    "nrg-own",
)


def folder(args):
    return "unified"


def jobs(args, device):
    return {
        f"{method}-{seed}": partial(judged, method, seed)
        for seed in range(args.seeds)
        for method in METHODS
    }


def report(args, rows):
    share, mean = truth()
    cells = [["p*", "0", f"{mean:.3f}", f"{share[EDGES[:-1] > -1e-6].sum():.3f}"]]
    curves = [("p*", share)]
    for method in METHODS:
        here = [row for row in rows if row["method"] == method]
        cells.append(
            [method, *(plus_minus(over_seeds(here, c), 3) for c in ("distance", "mean", "right"))]
        )
        curves.append(
            (
                method,
                torch.tensor([row["histogram"] for row in here])
                .reshape(-1, len(EDGES) - 1)
                .mean(0),
            )
        )

    middles, width = (EDGES[:-1] + EDGES[1:]) / 2, EDGES[1] - EDGES[0]
    series = {
        name: (name, middles.tolist(), (curve / width).tolist(), None) for name, curve in curves
    }
    dpo = [f"dpo-{beta:g}" for beta in DPO_BETAS]
    groups = ["reference", "rwr"], dpo, ["nrg-exact", "nrg-shared", "nrg-own"]
    charts = [
        Chart("density", [series[name] for name in ("p*", *group)], "x", "p(x)") for group in groups
    ]
    return {
        "rows": rows,
        "title": "Three ways to p*",
        "introduction": [
            f"p_ref: modes at -1 and 1, standard deviation {STD}; r(x) = x, beta {BETA:g}."
        ],
        "tables": [Table("", ["", "distance to p*", "mean", "mass above 0"], cells)],
        "pictures": {"unified": charts},
    }

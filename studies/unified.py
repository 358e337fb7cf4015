"""What the three algorithms have in common (paper, sections 4.1 and 4.4, Eq. 3, 7 and 10), where
the answer is known.

All three aim at p* = p_ref exp(r / beta) / Z (Eq. 7), the best trade of reward against KL from the
reference. p_ref is a mixture of two Gaussians on a line and r(x) = x, so p* is the same mixture
tilted: each mode moves up by its variance / beta, and its mass changes by exp(mean / beta). The
velocity of the reference is known too; a policy adds a small network to it that starts at zero.

    rwr            samples of p_ref weighted by exp(r / beta): its optimum is p* itself
    dpo-B          pairs of p_ref, labelled by Bradley-Terry on r / beta; B is the beta of the loss
    nrg-exact      guidance by the exact value function log E[exp(r(x0) / beta) | x_t]
    nrg-shared     guidance by a reward learned from such pairs, one noise for both (section 4.4)
    nrg-own        the same with separate noise for each

With one noise for both, x_t^w - x_t^l = (1 - t) (w - l): the noise cancels, Bradley-Terry finds the
score x_t / (1 - t) / beta, and its gradient grows towards t = 1, where that of the value function
falls to 0. With separate noise a score depends on what x_t says about x0, which is close to the
value."""

from functools import partial
from itertools import product

import torch

from data import draw_noise, step_rng
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from nrg import guide, noisy_pair_step
from sample import sample
from studies.report.charts import Chart, Series
from studies.report.tables import Column, Report, matching, tabulate

MEANS, STD = torch.tensor([-1.0, 1.0]), 0.4  # of the two modes, equally likely
BETA = 1.0  # of Eq. 3
STEPS, BATCH, RATE = 800, 256, 3e-3
SAMPLES, EULER = 10_000, 100
EDGES = torch.linspace(-3, 4, 71)
METHODS = {
    "reference": "p_ref",
    "rwr": "Flow-RWR",
    "dpo-0.3": "Flow-DPO, beta 0.3",
    "dpo-1": "Flow-DPO, beta 1",
    "dpo-3": "Flow-DPO, beta 3",
    "nrg-exact": "Flow-NRG, exact value function",
    "nrg-shared": "Flow-NRG, one noise a pair",
    "nrg-own": "Flow-NRG, two noises a pair",
}


def jobs(settings):
    queue = {}
    for seed, method in product(range(settings.seeds), METHODS):
        queue[f"{method}-{seed}"] = partial(judged, method, seed)
    return queue


def judged(method, seed):
    velocity, guidance = model_of(method, seed)
    x1 = torch.randn(SAMPLES, 1, generator=step_rng(seed, -1))
    y = torch.zeros(SAMPLES, 1, dtype=torch.int64)
    x0 = sample(velocity, x1, y, steps=EULER, shift=1.0, guidance=guidance)[:, 0]
    # first Wasserstein distance: between samples and quantiles, both in order
    distance = (x0.sort().values - quantiles(SAMPLES)).abs().mean().item()
    row = {"method": method, "seed": seed, "distance": distance, "mean": x0.mean().item()}
    row["right"] = (x0 > 0).float().mean().item()
    row["histogram"] = (torch.histogram(x0, EDGES).hist / SAMPLES).tolist()
    return [row]


# ---------------------------------------------------------------------------------------------
# What is known


def posterior(x_t, t, tilt=0.0):
    """Of x0 given x_t (B, 1) at t (B,), under p_ref exp(tilt x0): responsibilities (B, 2), means
    (B, 2), and log E[exp(tilt x0) | x_t] under p_ref (B,)."""
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


def exact_value(x_t, t, y):
    """log E[exp(r(x0) / beta) | x_t], (B, 1)."""
    return posterior(x_t, t, 1 / BETA)[2][:, None]


def below(x):
    """The distribution function of p* at x (N,)."""
    normal = torch.distributions.Normal(MEANS + STD**2 / BETA, STD)
    return (normal.cdf(x[:, None]) * torch.softmax(MEANS / BETA, 0)).sum(1)


def truth():
    """p* in the bins of EDGES, and its mean."""
    mean = (torch.softmax(MEANS / BETA, 0) * (MEANS + STD**2 / BETA)).sum().item()
    return below(EDGES).diff(), mean


def quantiles(count):
    """`count` evenly spaced quantiles of p*, from the lowest."""
    line = torch.linspace(-4, 4, 100_001)
    return line[torch.searchsorted(below(line), (torch.arange(count) + 0.5) / count)]


# ---------------------------------------------------------------------------------------------
# What is trained


def draw(count, rng):
    """Samples (count, 1) of p_ref."""
    mode = torch.randint(2, (count,), generator=rng)
    return (MEANS[mode] + STD * torch.randn(count, generator=rng))[:, None]


def labelled_pairs(rng):
    """Winner and loser (BATCH, 1): drawn from p_ref, decided by Bradley-Terry on r / beta."""
    a, b = draw(BATCH, rng), draw(BATCH, rng)
    first = torch.rand(BATCH, 1, generator=rng) < torch.sigmoid((a - b) / BETA)
    return torch.where(first, a, b), torch.where(first, b, a)


def fit(network, loss, seed):
    """Trains a network with loss: rng -> scalar; the rate falls to zero."""
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss(step_rng(seed, step)).backward()
        optimizer.step()


def model_of(method, seed):
    """(velocity, guidance) of a method."""
    if method == "reference":
        return reference, None
    if method == "nrg-exact":
        return reference, guide(exact_value, [1.0])
    torch.manual_seed(seed)
    first, middle, last = (torch.nn.Linear(*size) for size in ((2, 64), (64, 64), (64, 1)))
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)
    network = torch.nn.Sequential(first, torch.nn.SiLU(), middle, torch.nn.SiLU(), last)
    data = draw(20_000, step_rng(seed, -2))
    weight = rwr_weights(data[:, 0], BETA)
    no_prompt = torch.zeros(BATCH, 1, dtype=torch.int64)

    def learned(x_t, t, y):
        return network(torch.cat((x_t, t[:, None]), 1))

    def policy(x_t, t, y):
        return reference(x_t, t, y) + learned(x_t, t, y)

    def three_scores(x_t, t, y):
        return learned(x_t, t, y).expand(-1, 3)

    def rwr_loss(rng):
        rows = torch.randint(len(data), (BATCH,), generator=rng)
        noise = draw_noise(BATCH, (1,), 1.0, rng)
        return flow_rwr_step(policy, data[rows], no_prompt, weight[rows], **noise)[0]

    def dpo_loss(rng):
        pair, noise = labelled_pairs(rng), draw_noise(BATCH, (1,), 1.0, rng)
        beta = float(method.removeprefix("dpo-"))
        return flow_dpo_step(policy, reference, *pair, no_prompt, **noise, beta=beta)[0]

    def nrg_loss(rng):
        pair, noise = labelled_pairs(rng), draw_noise(BATCH, (1,), 1.0, rng)
        if method == "nrg-own":
            noise["x1_b"] = torch.randn(BATCH, 1, generator=rng)
        label = torch.ones(BATCH, 3, dtype=torch.int64)  # the winner comes first
        return noisy_pair_step(three_scores, *pair, no_prompt, label, **noise)[0]

    losses = {"rwr": rwr_loss, "dpo": dpo_loss, "nrg": nrg_loss}
    fit(network, losses[method[:3]], seed)
    return (reference, guide(learned, [1.0])) if method.startswith("nrg") else (policy, None)


# ---------------------------------------------------------------------------------------------
# The report


def report(rows):
    introduction = f"p_ref: modes at -1 and 1, standard deviation {STD}; r(x) = x, beta {BETA:g}."
    share, mean = truth()
    names = {"distance to p*": "distance", "mean": "mean", "mass above 0": "right"}
    columns = [Column(head, name, digits=3) for head, name in names.items()]
    lines = {label: {"method": method} for method, label in METHODS.items()}
    table = tabulate("", [""], rows, lines, columns)
    table.rows.insert(0, ["p*", "0", f"{mean:.3f}", f"{share[EDGES[:-1] > -1e-6].sum():.3f}"])
    return Report("Three ways to p*", introduction, {"unified": table}, {"unified": charts(rows)})


def charts(rows):
    """Densities of p*, of p_ref, and of the methods of each algorithm."""
    width = (EDGES[1] - EDGES[0]).item()
    middles = ((EDGES[:-1] + EDGES[1:]) / 2).tolist()
    panels = []
    for algorithm in ("Flow-RWR", "Flow-DPO", "Flow-NRG"):
        shares = {"p*": truth()[0]}
        for method, name in METHODS.items():
            if name == "p_ref" or name.startswith(algorithm):
                histograms = [row["histogram"] for row in matching(rows, method=method)]
                shares[name] = torch.tensor(histograms).mean(0)
        series = []
        for name, share in shares.items():
            density = (share / width).tolist()
            series.append(Series(name, middles, [(height, 0.0) for height in density]))
        panels.append(Chart(f"{algorithm} against p*", series, "x", "density p(x)"))
    return panels

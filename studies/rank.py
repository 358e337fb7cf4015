"""When is a reward model worth its training? Flow-DPO from N labelled pairs, with and without
VideoReward.

    labels     the annotators' labels of the N pairs rank their clips (--rank labels)
    reward     VideoReward, trained on these N pairs, ranks the clips that the policy trains on:
               those of the N pairs, or of 3,200 others, whose labels are not used

The steps of a VideoReward follow the square root of its pairs, as in `evaluate.py reward`; on 300
pairs, half and twice as many gave a lower accuracy on held-out labelled pairs. All policies take
the default steps and beta, and are judged by the oracle on the standard set at CFG 1."""

import time
from functools import partial
from itertools import product

from data import DIMENSIONS
from studies import policies
from studies.policies import TRUE
from studies.report.tables import Column, Report, tabulate

REWARD_STEPS = {3200: 550, 300: 170}  # by the number of labelled pairs
SETS, CFGS = {"standard": 256}, (1.0,)


def jobs(settings):
    queue = {}
    for seed, n in product(range(settings.seeds), REWARD_STEPS):
        queue[f"labels-{n}-{seed}"] = partial(from_labels, settings, n, seed)
        queue[f"reward-{n}-{seed}"] = partial(from_reward, settings, n, seed)
    return queue


def from_labels(settings, n, seed):
    facts = {"method": "labels", "labelled": n, "reward_minutes": 0.0}
    return aligned(settings, {"rank": "labels"}, n, seed, facts)


def from_reward(settings, n, seed):
    """Rows of the policies whose clips a VideoReward of `n` labelled pairs ranks."""
    steps = settings.steps or REWARD_STEPS[n]
    flags = {"algo": "reward", "generated": 0, "pairs": n, "steps": steps, "seed": seed}
    start = time.perf_counter()
    reward = policies.train(settings, f"videoreward-{n}-{seed}", flags)
    minutes = (time.perf_counter() - start) / 60
    facts = {"method": "reward", "labelled": n, "reward_minutes": minutes}
    rows = []
    for clips in sorted({n, max(REWARD_STEPS)}):
        rows += aligned(settings, {"reward": reward}, clips, seed, facts)
    return rows


def aligned(settings, ranking, clips, seed, facts):
    """Rows of a Flow-DPO on `clips` toy pairs."""
    flags = {"algo": "dpo", "pairs": clips, "seed": seed} | ranking
    name = f"{facts['method']}-{facts['labelled']}-{clips}-{seed}"
    return policies.policy_rows(settings, name, flags, SETS, CFGS, clips=clips, seed=seed, **facts)


def report(rows):
    """True win rates over the base model and true scores by the source of the ranking."""
    lines = {}
    for n, method, clips in product(REWARD_STEPS, ("labels", "reward"), sorted(REWARD_STEPS)):
        query = {"labelled": n, "method": method, "clips": clips}
        lines[f"{n:,}", method, f"{clips:,}"] = query
    columns = [Column(f"{name} wins", name, TRUE) for name in DIMENSIONS]
    columns += [Column(f"true {name}", f"{name}_score", TRUE) for name in DIMENSIONS]
    columns.append(Column("reward training, min", "reward_minutes", TRUE, 1, spread=False))
    corner = ["labelled pairs", "ranked by", "pairs of clips"]
    introduction = "Standard prompts, CFG 1, mean ± standard deviation over the seeds."
    table = tabulate("", corner, rows, lines, columns)
    return Report("Flow-DPO with and without a reward model", introduction, {"rank": table})

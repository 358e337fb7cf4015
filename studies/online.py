"""Online alignment (not in the paper, which aligns once): learned and true scores by round and
drift.

    dpo             offline: Flow-DPO once, on rendered pairs, for the same number of steps
    dpo-rounds      Flow-DPO on the best and worst of the policy's own clips, VideoReward frozen
    dpo-refreshed   the same, and every second round VideoReward learns from labels of these clips
    nft             DiffusionNFT on the policy's own clips, VideoReward frozen
    nft-refreshed   the same with new labels

Each has twice the default number of rounds, of 50 steps. On the way the policy samples the standard
prompts from the base model's noise. The judges are the oracle and the shipped VideoReward, which
the frozen arms train against. A run's own, refreshed VideoReward logs its scores of each round's
clips."""

import json
import shutil
from functools import partial
from itertools import product

from data import DIMENSIONS
from studies import policies
from studies.policies import JUDGES, TRUE
from studies.report.charts import Chart, curve
from studies.report.tables import Column, Report, matching, tabulate

ROUNDS = 20  # twice the default
STEPS = 1000  # of every arm
ARMS = {
    "dpo": {"algo": "dpo"},
    "dpo-rounds": {"algo": "dpo", "rounds": ROUNDS},
    "dpo-refreshed": {"algo": "dpo", "rounds": ROUNDS, "refresh": 2},
    "nft": {"algo": "nft", "rounds": ROUNDS},
    "nft-refreshed": {"algo": "nft", "rounds": ROUNDS, "refresh": 2},
}
JUDGED = (1, 2, 3, 4, 5, 7, 10, 15, 20)  # rounds after which a policy is judged
SHOWN = (2, 5, 10, 20)  # rows of the table
SAVED = 10  # the round whose policy the report shows
SETS, CFGS = {"standard": 256}, (1.0,)


def jobs(settings):
    base = {"study": "judged", "round": 0, "drift": 0.0}
    queue = {"base": partial(policies.base_rows, settings, SETS, CFGS, **base)}
    for seed, arm in product(range(settings.seeds), ARMS):
        queue[f"{arm}-{seed}"] = partial(aligned, settings, arm, seed)
    return queue


def aligned(settings, arm, seed):
    """Rows of one run: judged after the rounds of JUDGED, and, as study "own", the scores of each
    round's clips from its log."""
    steps = settings.steps or STEPS
    length = steps // ROUNDS
    rows = []

    def judged(step, checkpoint):
        number = step // length
        facts = {"study": "judged", "method": arm, "round": number, "seed": seed}
        rows.extend(policies.checkpoint_rows(settings, checkpoint, SETS, CFGS, **facts))
        if number == SAVED:
            shutil.copy(checkpoint, checkpoint.with_name(f"round-{number}.pt"))

    flags = ARMS[arm] | {"seed": seed, "steps": steps}
    ends = [length * number for number in JUDGED[:-1]]
    checkpoint = policies.train(settings, f"{arm}-{seed}", flags, ends, judged)
    log = checkpoint.with_name("metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, log[::length]):
        if "round" in line:
            row = {"study": "own", "method": arm, "seed": seed}
            rows.append(row | {name: line[name] for name in ("round", "learned", "true")})
    return rows


# ---------------------------------------------------------------------------------------------
# The report


def report(rows):
    introduction = (
        "Standard prompts, CFG 1, mean ± standard deviation over the seeds; for offline dpo a "
        "round is the same number of steps. z: the mean of the three dimensions as z-scores."
    )
    tables = {"online": by_round(matching(rows, study="judged"))}
    return Report("Online alignment", introduction, tables, {"online": charts(rows)})


def by_round(rows):
    columns = [Column("drift", "drift", TRUE, 3, spread=False)]
    columns += [Column(f"true {name}", f"{name}_score", TRUE) for name in DIMENSIONS]
    columns.append(Column("mean", "score", TRUE, 3))
    for head, judge in zip(("true z", "learned z"), JUDGES):
        columns.append(Column(head, "z", {"judge": judge}, spread=False))
    lines = {}
    for arm, number in [("base", 0), *product(ARMS, SHOWN)]:
        lines[arm, str(number)] = {"method": arm, "round": number}
    return tabulate("By round", ["arm", "rounds"], rows, lines, columns)


def charts(rows):
    """z-scores by round in truth and by two judges, and the truth by drift."""
    judged, own = matching(rows, study="judged"), matching(rows, study="own")
    base = matching(judged, method="base")
    by_round, by_drift, by_judge, by_own = [], [], [], []
    for arm in ARMS:
        runs = base + matching(judged, method=arm)
        by_round.append(curve(arm, runs, "round", "z", judge="oracle"))
        by_drift.append(curve(arm, runs, "round", "z", "drift", judge="oracle"))
        by_judge.append(curve(arm, runs, "round", "z", judge="videoreward"))
        by_own.append(curve(arm, own, "round", "learned", method=arm))
    y = "mean z-score"
    return [
        Chart("The truth by round", by_round, "round", y),
        Chart("The truth by drift", by_drift, "drift from the base model", y, axis="root"),
        Chart("The shipped VideoReward by round", by_judge, "round", y),
        Chart("The run's own VideoReward by round", by_own[1:], "round", y),  # dpo has none
    ]

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
from judge import over_seeds
from studies import policies
from studies.policies import JUDGES, TRUE
from studies.report.charts import Chart, Series
from studies.report.tables import Column, matching, melted, tabulate

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
    queue = {"base": partial(unaligned, settings)}
    for seed, arm in product(range(settings.seeds), ARMS):
        queue[f"{arm}-{seed}"] = partial(aligned, settings, arm, seed)
    return queue


def unaligned(settings):
    base = policies.base_scores(settings, SETS, CFGS)
    return policies.rows_of(base, base, study="judged", method="base", round=0, seed=0, drift=0.0)


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


def report(settings, rows):
    judged = matching(rows, study="judged")
    oracle, learned = (matching(judged, judge=judge) for judge in JUDGES)
    seeds = len({row["seed"] for row in rows})
    introduction = [
        f"Standard prompts, CFG 1, mean ± standard deviation over {seeds} seeds; for offline dpo a",
        "round is the same number of steps. z: the mean of the three dimensions as z-scores.",
    ]
    return {
        "title": "Online alignment",
        "introduction": introduction,
        "tables": tables(judged, matching(rows, study="own")),
        "pictures": {"online": charts(oracle, learned)},
    }


def tables(judged, own):
    columns = [Column("drift", "drift", TRUE, 3, spread=False)]
    columns += [Column(f"true {name}", f"{name}_score", TRUE) for name in DIMENSIONS]
    columns.append(Column("mean", "score", TRUE, 3))
    for head, judge in zip(("true z", "learned z"), JUDGES):
        columns.append(Column(head, "z", {"judge": judge}, spread=False))
    lines = {}
    for arm, number in [("base", 0), *product(ARMS, SHOWN)]:
        lines[arm, str(number)] = {"method": arm, "round": number}
    made = {"online": tabulate("By round", ["arm", "rounds"], judged, lines, columns)}

    rounds = sorted({row["round"] for row in own})
    columns = [Column(f"{number:g}", "value", {"round": number}) for number in rounds]
    lines = {}
    for arm, name in product(list(ARMS)[1:], ("learned", "true")):  # offline dpo has no rounds
        lines[f"{arm}, {name}"] = {"method": arm, "name": name}
    title = "Scores of a round's clips by its own VideoReward and by the oracle, mean of the three"
    own = melted(own, ("learned", "true"))
    made["online-own"] = tabulate(title, [""], own, lines, columns)
    return made


def charts(oracle, learned):
    """z-scores by round in truth and by VideoReward, and the truth by drift."""
    by_round, by_learned, by_drift = [], [], []
    for arm in ARMS:
        points = [{"method": "base", "round": 0}]
        points += [{"method": arm, "round": number} for number in JUDGED]
        true = [over_seeds(oracle, "z", **point) for point in points]
        drifts = [over_seeds(oracle, "drift", **point)[0] for point in points]
        by_round.append(Series(arm, (0, *JUDGED), true))
        by_drift.append(Series(arm, drifts, true))
        scores = [over_seeds(learned, "z", **point) for point in points]
        by_learned.append(Series(arm, (0, *JUDGED), scores))
    return [
        Chart("The truth by round", by_round, "round", "mean z-score"),
        Chart("VideoReward by round", by_learned, "round", "mean z-score"),
        Chart(
            "The truth by drift", by_drift, "drift from the base model", "mean z-score", axis="root"
        ),
    ]

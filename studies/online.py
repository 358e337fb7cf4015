"""Alignment that goes on (not in the paper, which aligns once): learned and true scores by round and by drift.

    dpo             offline: Flow-DPO once, on rendered pairs, for as many steps
    dpo-rounds      Flow-DPO on the best and worst of the policy's own clips, VideoReward frozen
    dpo-refreshed   the same, and every second round VideoReward learns from new labels of the policy's clips
    nft             DiffusionNFT on the policy's own clips, VideoReward frozen
    nft-refreshed   the same with new labels

Each takes twice the default number of rounds, of 50 steps. On the way the policy samples the standard prompts from the
base model's noise; the judges are the oracle and the shipped VideoReward, whom the frozen arms are trained to please
and the refreshed ones leave behind. What a refreshed VideoReward says of its own rounds stands in their metrics.jsonl.
"""

import json
import shutil
from functools import partial
from itertools import product

import tasks
from data import DIMENSIONS
from judge import over_seeds
from settings import Dpo
from studies.jobs import (
    JUDGES,
    base_scores,
    drift,
    judge,
    mean_z,
    rows_of,
    settings_for,
    train_and_judge,
)
from studies.report.charts import Chart
from studies.report.tables import Table, plus_minus

ROUNDS = 20  # twice the default
STEPS = 1000  # of every arm
ARMS = {
    "dpo": ["--algo=dpo"],
    "dpo-rounds": ["--algo=dpo", f"--rounds={ROUNDS}"],
    "dpo-refreshed": ["--algo=dpo", f"--rounds={ROUNDS}", "--refresh=2"],
    "nft": ["--algo=nft", f"--rounds={ROUNDS}"],
    "nft-refreshed": ["--algo=nft", f"--rounds={ROUNDS}", "--refresh=2"],
}
JUDGED = (1, 2, 3, 4, 5, 7, 10, 15, 20)  # after so many rounds
SHOWN = (2, 5, 10)  # rounds whose policies are kept, for clips on the report page
SETS, CFGS = {"standard": 256}, (1.0,)


def aligned(arm, seed, args, device):
    """Rows of one run: judged after the rounds of JUDGED, and, as study "own", what its VideoReward and the oracle say
    of each round's own clips, from its log."""
    out = args.work / "online" / f"{arm}-{seed}"
    settings = settings_for([*ARMS[arm], f"--seed={seed}", f"--steps={STEPS}"], out, args)
    length, base, rows = settings.steps // ROUNDS, base_scores(args, device, SETS, CFGS), []

    def judged(step, path):
        facts = {
            "study": "judged",
            "method": arm,
            "round": step // length,
            "seed": seed,
            "drift": drift(path, device),
        }
        rows.extend(rows_of(judge(path, args, device, SETS, CFGS), base, **facts))
        if step // length in SHOWN:
            shutil.copy(path, out / f"round-{step // length}.pt")

    steps = [length * number for number in JUDGED[:-1]]
    train_and_judge(tasks.TASKS[settings.algo](settings, device), settings, device, steps, judged)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines()[::length])
    own = {"study": "own", "method": arm, "seed": seed}
    return rows + [
        own | {name: line[name] for name in ("round", "learned", "true")}
        for line in lines
        if "round" in line
    ]


def unaligned(args, device):
    base = base_scores(args, device, SETS, CFGS)
    return rows_of(base, base, study="judged", method="base", round=0, seed=0, drift=0.0)


def folder(args):
    return f"online-{args.steps or 'all'}-{args.eval_prompts or 'all'}"


def jobs(args, device):
    made = {"base": partial(unaligned, args, device)}
    for seed in range(args.seeds):
        for arm in ARMS:
            made[f"{arm}-{seed}"] = partial(aligned, arm, seed, args, device)
    return made


# ---------------------------------------------------------------------------------------------
# The report


def report(args, rows):
    scores = [f"{n}_score" for n in DIMENSIONS]
    judged = [
        row | {"mean_score": sum(row[n] for n in scores) / len(scores)}
        for row in rows
        if row["study"] == "judged"
    ]
    figure, cells = partial(over_seeds, judged), []
    for arm, number in [("base", 0), *product(ARMS, JUDGED)]:
        here = {"method": arm, "round": number}
        true = [plus_minus(figure(n, judge="oracle", **here)) for n in scores]
        row = [f"{arm}, {number}", f"{figure('drift', judge='oracle', **here)[0]:.4f}", *true]
        row += [plus_minus(figure("mean_score", judge="oracle", **here), 3)]
        row += [f"{mean_z(judged, by, **here):.2f}" for by in JUDGES]
        cells.append(row + [plus_minus(figure(n, judge="oracle", **here)) for n in DIMENSIONS])
    head = [
        "arm, rounds",
        "drift",
        *(f"true {n}" for n in DIMENSIONS),
        "mean",
        *(f"z {by}" for by in JUDGES),
    ]
    tables = [
        findings(figure, args.seeds),
        Table("By round", [*head, *(f"oracle {n}" for n in DIMENSIONS)], cells),
    ]

    rounds = sorted({row["round"] for row in rows if row["study"] == "own"})
    own = []
    for arm, said in product(ARMS, ("learned", "true")):
        curve = [over_seeds(rows, said, study="own", method=arm, round=number) for number in rounds]
        own.append([f"{arm}, {said}", *map(plus_minus, curve)])
    title = "What a round's own VideoReward and the oracle say of its clips, mean of the three"
    tables.append(
        Table(title, ["", *(f"{number:g}" for number in rounds)], own[2:])
    )  # dpo has no rounds

    charts, together, away = [], [], []
    for arm in ARMS:
        ways = [
            {"method": "base", "round": 0},
            *({"method": arm, "round": number} for number in JUDGED),
        ]
        z = {by: [mean_z(judged, by, **way) for way in ways] for by in JUDGES}
        charts.append(
            Chart(arm, [(by, (0, *JUDGED), z[by], None) for by in JUDGES], "round", "mean z-score")
        )
        drifted = [figure("drift", judge="oracle", **way)[0] for way in ways]
        together.append((arm, (0, *JUDGED), z["oracle"], None))
        away.append((arm, drifted, z["oracle"], None))
    charts.append(Chart("the truth by round", together, "round", "true z-score"))
    charts.append(Chart("the truth by drift", away, "drift", "true z-score"))
    return {
        "rows": rows,
        "title": "Alignment that goes on",
        "introduction": [
            f"Standard set, CFG 1, mean ± sd over {args.seeds} seeds; of offline dpo as many steps are a round. z: the",
            "mean of the three dimensions as z-scores.",
        ],
        "tables": tables,
        "pictures": {"online": charts},
    }


def findings(figure, seeds):
    """What is asked of rounds, held against the oracle. Yes is in every seed, no in none."""
    once, last = Dpo.steps // (STEPS // ROUNDS), ROUNDS
    rows = []

    def mean(arm, number, **seed):
        return figure("mean_score", method=arm, round=number, judge="oracle", **seed)[0]

    def line(text, test):
        """test: a seed or none for all -> (whether it holds, figures)."""
        held = sum(test(seed=seed)[0] for seed in range(seeds))
        answer = {0: "no", seeds: "yes"}.get(held, f"in {held} of {seeds}")
        rows.append([text, f"{answer}: {test()[1]}"])

    def above(text, first, second, by_least=0.0):
        def test(**seed):
            one, other = mean(*first, **seed), mean(*second, **seed)
            return one >= other + by_least, f"{one:.3f} against {other:.3f}"

        line(text, test)

    def no_worse(arm, **seed):
        changes = []
        for name in DIMENSIONS:
            wanted = {"column": f"{name}_score", "judge": "oracle", **seed}
            ends = [
                figure(method=m, round=number, **wanted)[0]
                for m, number in ((arm, last), ("dpo", last))
            ]
            changes.append(ends[0] - ends[1])
        return min(changes) >= -0.02, ", ".join(
            f"{n} {change:+.3f}" for n, change in zip(DIMENSIONS, changes)
        )

    def stays(arm, **seed):
        best = max(mean(arm, number, **seed) for number in JUDGED)
        return mean(
            arm, last, **seed
        ) >= best - 0.03, f"{mean(arm, last, **seed):.3f}, best {best:.3f}"

    for arm in ("dpo-refreshed", "nft-refreshed"):
        for number, said in ((once, "the default's"), (last, "as many")):
            text = f"{arm} ends .08 above offline dpo of {said} steps, mean of the three"
            above(text, (arm, last), ("dpo", number), by_least=0.08)
        line(
            f"{arm} ends with none of the three .02 below offline dpo of as many steps",
            partial(no_worse, arm),
        )
        line(f"{arm} ends no more than .03 below its best round", partial(stays, arm))
    for one, other in (("nft", "dpo-rounds"), ("nft-refreshed", "dpo-refreshed")):
        above(f"{one} ends above {other}, of as many clips", (one, last), (other, last))
    for arm in ("dpo", "nft"):
        frozen = "dpo-rounds" if arm == "dpo" else arm
        above(f"{arm}-refreshed ends above {frozen}", (f"{arm}-refreshed", last), (frozen, last))
    title = "What is asked of rounds, and what is found here (true scores)"
    return Table(title, ["asked", "here"], rows, "findings")

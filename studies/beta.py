"""How to choose beta (paper, section 5.2, Fig. 6), and what too much training does, on the toy world.

Sweep: Flow-DPO with both schedules over a range of beta, aligned 1:1:1, judged on the standard and the hard set.

Long run: every method for five times the default length on the same pairs, with the score by VideoReward and the true
score on the way, against the drift from the base model, |v - v_ref|^2 on clips and noise that are the same for all.
Beside them best of n, whose drift is a KL divergence. Where the learned score rises and the true one falls, the policy
has learned the reward's mistakes. The paper could not draw these curves: they need the truth.
"""

from functools import partial

import tasks
import trainer
from data import DIMENSIONS
from judge import mean_and_spread, over_seeds
from settings import Dpo
from studies.jobs import (
    BEST_OF,
    JUDGES,
    METHODS,
    base_scores,
    best_of,
    drift,
    judge,
    mean_z,
    nats,
    rows_of,
    settings_for,
    train_and_judge,
)
from studies.report.charts import Chart
from studies.report.tables import Table, plus_minus

BETAS = (10, 30, 100, 300, 1000, 3000)  # the paper's: 100 to 8000
SCHEDULES = ("dpo-constant", "dpo-schedule")
LONG = (*SCHEDULES, "sft", "rwr")
SETS = {"standard": 128, "hard": 96}
CFGS = (1.0,)
NAMES = (*DIMENSIONS, *(f"{n}_score" for n in DIMENSIONS))
LENGTHS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # of the default number of steps


def swept(method, beta, seed, args, device):
    out = args.work / "beta" / f"{method}-{beta}-{seed}"
    settings = settings_for([*METHODS[method], f"--beta={beta}", f"--seed={seed}"], out, args)
    trainer.fit(tasks.TASKS["dpo"](settings, device), settings, device)
    scores, base = (
        judge(out / "last.pt", args, device, SETS, CFGS),
        base_scores(args, device, SETS, CFGS),
    )
    return rows_of(
        scores,
        base,
        study="sweep",
        method=method,
        beta=beta,
        seed=seed,
        drift=drift(out / "last.pt", device),
    )


def long_run(method, seed, args, device):
    """One training, judged after each of LENGTHS."""
    out = args.work / "beta" / f"{method}-long-{seed}"
    settings = settings_for([*METHODS[method], f"--seed={seed}"], out, args)
    lengths = [max(1, round(settings.steps * length)) for length in LENGTHS]
    settings.steps, base, rows = lengths[-1], base_scores(args, device, SETS, CFGS), []

    def judged(step, path):
        facts = {
            "study": "long",
            "method": method,
            "steps": step,
            "seed": seed,
            "drift": drift(path, device),
        }
        rows.extend(rows_of(judge(path, args, device, SETS, CFGS), base, **facts))

    train_and_judge(tasks.TASKS[settings.algo](settings, device), settings, device, lengths, judged)
    return rows


def picked(seed, args, device):
    base, rows = base_scores(args, device, SETS, CFGS), []
    for n, scores in best_of(seed, args, device, SETS, (1.0, 1.0, 1.0)).items():
        facts = {"study": "best", "method": "best-of-n", "steps": n, "seed": seed, "drift": nats(n)}
        rows += rows_of(scores, base, **facts)
    return rows


def folder(args):
    return f"beta-{args.steps or Dpo.steps}-{args.eval_prompts or 'all'}"


def jobs(args, device):
    made = {}
    for seed in range(args.seeds):
        made[f"best-of-{seed}"] = partial(picked, seed, args, device)
        for method in LONG:
            made[f"{method}-long-{seed}"] = partial(long_run, method, seed, args, device)
        for method in SCHEDULES:
            for beta in BETAS:
                made[f"{method}-{beta}-{seed}"] = partial(swept, method, beta, seed, args, device)
    return made


# ---------------------------------------------------------------------------------------------
# The report


def report(args, rows):
    def curve(column, x, xs, **wanted):
        """[(mean, spread)] over the seeds at each of xs."""
        here = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
        return [mean_and_spread([row[column] for row in here if row[x] == value]) for value in xs]

    def table(title, head, xs, x, **wanted):
        columns = [curve("drift", x, xs, judge="oracle", set="standard", **wanted)]
        columns += [
            curve(n, x, xs, judge=by, set="standard", **wanted) for by in JUDGES for n in NAMES
        ]
        cells = [
            [
                str(value),
                f"{columns[0][i][0]:.4f}",
                *(plus_minus(column[i]) for column in columns[1:]),
            ]
            for i, value in enumerate(xs)
        ]
        return Table(title, [head, "drift", *(f"{by} {n}" for by in JUDGES for n in NAMES)], cells)

    steps = sorted({row["steps"] for row in rows if row["study"] == "long"})
    tables = [
        table(f"{m}: sweep", "beta", BETAS, "beta", study="sweep", method=m) for m in SCHEDULES
    ]
    tables += [
        table(f"{m}: long run", "steps", steps, "steps", study="long", method=m) for m in LONG
    ]
    tables.append(table("best of n", "n", BEST_OF, "steps", study="best"))

    sweeps, runs = [], []
    for name in SETS:
        for by in JUDGES:
            series = []
            for method in SCHEDULES:
                points = curve(
                    "TA", "beta", BETAS, study="sweep", method=method, judge=by, set=name
                )
                series.append((method, BETAS, *zip(*points)))
            sweeps.append(
                Chart(f"TA, {name} set, {by}", series, "beta", "win rate", log=True, level=0.5)
            )
    figure, together = partial(over_seeds, rows, set="standard"), []

    for method in (*LONG, "best-of-n"):
        lengths, x = (BEST_OF[1:], "KL") if method == "best-of-n" else (steps, "drift")
        ways = [{"method": "best-of-n", "steps": 1}]  # the base model
        ways += [
            {"method": method, "steps": n, "study": "best" if x == "KL" else "long"}
            for n in lengths
        ]
        away = [figure("drift", judge="oracle", **way)[0] for way in ways]
        scores = {by: [mean_z(rows, by, set="standard", **way) for way in ways] for by in JUDGES}
        series = [(by, away, scores[by], None) for by in JUDGES]
        runs.append(Chart(method, series, f"{x} from the base model", "mean z-score"))
        if method != "dpo-schedule":  # which leaves the others' range
            together.append((method, scores["videoreward"], scores["oracle"], None))
    runs.append(
        Chart(
            "the truth by what VideoReward says", together, "VideoReward's z-score", "true z-score"
        )
    )
    return {
        "rows": rows,
        "title": "Choosing beta on the toy world",
        "introduction": [
            f"Standard set, CFG 1, mean ± sd over {args.seeds} seeds: win rates over the base model, and mean scores",
            "(the oracle's own; VideoReward's as z-scores).",
        ],
        "tables": tables,
        "pictures": {"beta_long": runs, "beta_sweep": sweeps},
    }

"""How to choose beta (paper, section 5.2, Fig. 6), and what too much training does, on the toy world.

Sweep: Flow-DPO with both schedules over a range of beta, aligned 1:1:1, judged on the standard and the hard set.

Long run: five times the default length on the same pairs, with the score by VideoReward and the true score on the way,
against the drift from the reference, |v - v_ref|^2 on the training batches. Where the learned score rises and the true
one falls, the policy has learned the reward's mistakes. The paper could not draw this curve: it needs the truth.
"""

import json
from functools import partial

import train
from data import DIMENSIONS
from evaluate import mean_and_spread
from runtime.checkpoint import load_checkpoint
from studies.jobs import JUDGES, METHODS, base_scores, judge, rows_of, settings_for
from studies.report.charts import Chart
from studies.report.tables import Table, plus_minus
from world import TRUE_MEAN, TRUE_STD

BETAS = (10, 30, 100, 300, 1000, 3000)  # the paper's: 100 to 8000
SCHEDULES = ("dpo-constant", "dpo-schedule")
SETS = {"standard": 128, "hard": 96}
CFGS = (1.0,)
NAMES = (*DIMENSIONS, *(f"{n}_score" for n in DIMENSIONS))
LENGTHS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # of the default number of steps


def drift(out, last=50):
    """Mean drift over the last steps in a run's log."""
    lines = (out / "metrics.jsonl").read_text().splitlines()[-last:]
    return sum(json.loads(line)["drift"] for line in lines) / len(lines)


def swept(method, beta, seed, args, device):
    out = args.work / "beta" / f"{method}-{beta}-{seed}"
    settings = settings_for([*METHODS[method], f"--beta={beta}", f"--seed={seed}"], out, args)
    train.train(train.TASKS["dpo"](settings, device), settings, device)
    scores, base = judge(out / "last.pt", args, device, SETS, CFGS), base_scores(args, device, SETS, CFGS)
    return rows_of(scores, base, study="sweep", method=method, beta=beta, seed=seed, drift=drift(out))


def long_run(method, seed, args, device):
    """Trains to each of LENGTHS in turn, on from the last: the same run as one without stops."""
    out = args.work / "beta" / f"{method}-long-{seed}"
    settings = settings_for([*METHODS[method], f"--seed={seed}"], out, args)
    default, base, rows, state = settings.steps, base_scores(args, device, SETS, CFGS), [], None
    task = train.TASKS["dpo"](settings, device)
    for length in LENGTHS:
        settings.steps = max(1, round(default * length))
        train.train(task, settings, device, state)
        state = load_checkpoint(out / "last.pt")
        scores = judge(out / "last.pt", args, device, SETS, CFGS)
        facts = {"study": "long", "method": method, "steps": settings.steps, "seed": seed, "drift": drift(out)}
        rows += rows_of(scores, base, **facts)
    return rows


def folder(args):
    return f"beta-{args.steps or train.DEFAULTS['dpo']['steps']}-{args.eval_prompts or 'all'}"


def jobs(args, device):
    made = {}
    for seed in range(args.seeds):
        for method in SCHEDULES:
            made[f"{method}-long-{seed}"] = partial(long_run, method, seed, args, device)
            for beta in BETAS:
                made[f"{method}-{beta}-{seed}"] = partial(swept, method, beta, seed, args, device)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(args, rows):
    def curve(column, x, xs, **wanted):
        """[(mean, spread)] over the seeds at each of xs."""
        here = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
        return [mean_and_spread([row[column] for row in here if row[x] == value]) for value in xs]

    def table(title, head, xs, x, **wanted):
        columns = [curve("drift", x, xs, judge="oracle", set="standard", **wanted)]
        columns += [curve(n, x, xs, judge=by, set="standard", **wanted) for by in JUDGES for n in NAMES]
        cells = [
            [str(value), f"{columns[0][i][0]:.4f}", *(plus_minus(column[i]) for column in columns[1:])]
            for i, value in enumerate(xs)
        ]
        return Table(title, [head, "drift", *(f"{by} {n}" for by in JUDGES for n in NAMES)], cells)

    steps = sorted({row["steps"] for row in rows if row["study"] == "long"})
    tables = [table(f"{m}: sweep", "beta", BETAS, "beta", study="sweep", method=m) for m in SCHEDULES]
    tables += [table(f"{m}: long run", "steps", steps, "steps", study="long", method=m) for m in SCHEDULES]

    sweeps, runs = [], []
    for name in SETS:
        for by in JUDGES:
            series = []
            for method in SCHEDULES:
                points = curve("TA", "beta", BETAS, study="sweep", method=method, judge=by, set=name)
                series.append((method, BETAS, *zip(*points)))
            sweeps.append(Chart(f"TA, {name} set, {by}", series, "beta", "win rate", log=True, level=0.5))
    for method in SCHEDULES:
        wanted = {"study": "long", "method": method, "set": "standard"}
        away = [mean for mean, _ in curve("drift", "steps", steps, judge="oracle", **wanted)]
        for i, name in enumerate(DIMENSIONS):
            learned = [m for m, _ in curve(f"{name}_score", "steps", steps, judge="videoreward", **wanted)]
            true = [m for m, _ in curve(f"{name}_score", "steps", steps, judge="oracle", **wanted)]
            true = [(value - TRUE_MEAN[i].item()) / TRUE_STD[i].item() for value in true]
            series = [("videoreward", away, learned, None), ("oracle", away, true, None)]
            runs.append(Chart(f"{method}: {name}", series, "drift from the reference", "z-score"))
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

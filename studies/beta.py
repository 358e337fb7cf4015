"""How to choose beta (paper, section 5.2, Fig. 6), and what too much training does.

Sweep: Flow-DPO with both schedules over a range of beta, aligned 1:1:1, on the standard and hard
sets.

Long run: every method for five times the default steps on the same pairs. On the way, the learned
and the true score against the drift |v - v_ref|^2 from the base model. Where the learned score
rises and the true one falls, the policy exploits the reward's mistakes. The paper could not draw
these curves: they need the truth."""

from functools import partial
from itertools import product

from data import DIMENSIONS
from settings import ALGORITHMS
from studies import policies
from studies.policies import JUDGES, METHODS, NAMES, TRUE
from studies.report.charts import Chart, curve
from studies.report.tables import Column, Report, matching, tabulate

BETAS = (10, 30, 100, 300, 1000, 3000)  # the paper's: 100 to 8000
SCHEDULES = ("dpo-constant", "dpo-schedule")
LONG = (*SCHEDULES, "sft", "rwr")
LENGTHS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # of a long run, in default numbers of steps
SETS = {"standard": 128, "hard": 96}
CFGS = (1.0,)


def jobs(settings):
    base = {"study": "long", "steps": 0, "drift": 0.0}
    queue = {"base": partial(policies.base_rows, settings, SETS, CFGS, **base)}
    for seed in range(settings.seeds):
        for method in LONG:
            queue[f"{method}-long-{seed}"] = partial(long_run, settings, method, seed)
        for method, beta in product(SCHEDULES, BETAS):
            queue[f"{method}-{beta}-{seed}"] = partial(swept, settings, method, beta, seed)
    return queue


def swept(settings, method, beta, seed):
    flags = METHODS[method] | {"beta": beta, "seed": seed}
    facts = {"study": "sweep", "method": method, "beta": beta, "seed": seed}
    return policies.policy_rows(settings, f"{method}-{beta}-{seed}", flags, SETS, CFGS, **facts)


def long_run(settings, method, seed):
    """One training, judged after each of LENGTHS."""
    algo = METHODS[method]["algo"]
    steps = policies.steps_of(settings, algo)
    lengths = [max(1, round(steps * length)) for length in LENGTHS]
    rows = []

    def judged(step, checkpoint):
        facts = {"study": "long", "method": method, "steps": step, "seed": seed}
        rows.extend(policies.checkpoint_rows(settings, checkpoint, SETS, CFGS, **facts))

    pairs = steps * ALGORITHMS[algo].batch
    flags = METHODS[method] | {"steps": lengths[-1], "pairs": pairs, "seed": seed}
    policies.train(settings, f"{method}-long-{seed}", flags, lengths, judged)
    return rows


# ---------------------------------------------------------------------------------------------
# The report


def report(rows):
    introduction = (
        "Standard prompts, CFG 1, means over the seeds: drift from the base model, true win rates "
        "over it, and scores (the oracle's own; VideoReward's as z-scores)."
    )
    standard = matching(rows, set="standard")
    pictures = {"beta_long": long_charts(standard), "beta_sweep": sweep_charts(rows)}
    return Report("Choosing beta on the toy world", introduction, tables(standard), pictures)


def tables(rows):
    columns = [Column("drift", "drift", TRUE, 3, spread=False)]
    columns += [Column(name, name, TRUE, spread=False) for name in DIMENSIONS]
    for head, judge in zip(("true VQ", "VideoReward's VQ"), JUDGES):
        columns.append(Column(head, "VQ_score", {"judge": judge}, spread=False))

    def table(title, study, methods, key):
        own = matching(rows, study=study)
        lines = {}
        for method, value in product(methods, sorted({row[key] for row in own})):
            lines[NAMES[method], str(value)] = {"method": method, key: value}
        return tabulate(title, ["method", key], own, lines, columns)

    return {
        "sweep": table("Sweep of beta", "sweep", SCHEDULES, "beta"),
        "long": table("Long run", "long", LONG, "steps"),
    }


def sweep_charts(rows):
    charts = []
    for name, judge in product(SETS, JUDGES):
        query = {"study": "sweep", "set": name, "judge": judge}
        series = [curve(NAMES[m], rows, "beta", "TA", method=m, **query) for m in SCHEDULES]
        title = f"{name.capitalize()} prompts, {judge}"
        charts.append(Chart(title, series, "beta", "win rate in TA", axis="log", level=0.5))
    return charts


def long_charts(rows):
    """Learned and true z-score by drift of each method."""
    charts = []
    for method in LONG:
        own = matching(rows, study="long", method="base") + matching(
            rows, study="long", method=method
        )
        series = [curve(judge, own, "steps", "z", "drift", judge=judge) for judge in JUDGES]
        y = "mean z-score"
        if method == "dpo-schedule":  # its collapse would flatten the others
            y = "mean z-score, wider range"
        charts.append(Chart(NAMES[method], series, "drift from the base model", y, axis="root"))
    return charts

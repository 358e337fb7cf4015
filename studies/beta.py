"""How to choose beta (paper, section 5.2, Fig. 6), and what too much training does.

Sweep: Flow-DPO with both schedules over a range of beta, aligned 1:1:1, on the standard and hard
sets.

Long run: every method for five times the default steps on the same pairs. On the way, the learned
and the true score against the drift |v - v_ref|^2 from the base model; beside them best of n, whose
drift is a KL divergence. Where the learned score rises and the true one falls, the policy exploits
the reward's mistakes. The paper could not draw these curves: they need the truth."""

from functools import partial
from itertools import product

from data import DIMENSIONS
from judge import over_seeds
from settings import ALGORITHMS
from studies import policies
from studies.policies import BEST_OF, JUDGES, METHODS, NAMES, TRUE
from studies.report.charts import Chart, Series
from studies.report.tables import Column, matching, means, tabulate

BETAS = (10, 30, 100, 300, 1000, 3000)  # the paper's: 100 to 8000
SCHEDULES = ("dpo-constant", "dpo-schedule")
LONG = (*SCHEDULES, "sft", "rwr")
LENGTHS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)  # of a long run, in default numbers of steps
SETS = {"standard": 128, "hard": 96}
CFGS = (1.0,)


def jobs(settings):
    queue = {}
    for seed in range(settings.seeds):
        queue[f"best-of-{seed}"] = partial(picked, settings, seed)
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


def picked(settings, seed):
    base = policies.base_scores(settings, SETS, CFGS)
    rows = []
    for n, scores in policies.best_of(settings, seed, SETS, (1.0, 1.0, 1.0)).items():
        facts = {"study": "best", "method": "best-of-n", "steps": n, "seed": seed}
        rows += policies.rows_of(scores, base, **facts, drift=policies.nats(n))
    return rows


# ---------------------------------------------------------------------------------------------
# The report


def report(settings, rows):
    seeds = len({row["seed"] for row in rows})
    introduction = [
        f"Standard prompts, CFG 1, mean over {seeds} seeds: drift from the base model, true win",
        "rates over it, and scores (the oracle's own; VideoReward's as z-scores).",
    ]
    standard = matching(rows, set="standard")
    return {
        "title": "Choosing beta on the toy world",
        "introduction": introduction,
        "tables": tables(standard),
        "pictures": {"beta_long": long_charts(standard), "beta_sweep": sweep_charts(rows)},
    }


def tables(rows):
    columns = [Column("drift", "drift", TRUE, 3, spread=False)]
    columns += [Column(name, name, TRUE, spread=False) for name in DIMENSIONS]
    for head, judge in zip(("true VQ", "VideoReward's VQ"), JUDGES):
        columns.append(Column(head, "VQ_score", {"judge": judge}, spread=False))

    def table(title, methods, key, study):
        own = matching(rows, study=study)
        lines = {}
        for method, value in product(methods, sorted({row[key] for row in own})):
            lines[NAMES.get(method, "best of n"), str(value)] = {"method": method, key: value}
        return tabulate(title, ["method", key], own, lines, columns)

    return {
        "beta-sweep": table("Sweep of beta", SCHEDULES, "beta", "sweep"),
        "beta-long": table("Long run: Flow-DPO", SCHEDULES, "steps", "long"),
        "beta-others": table("Long run: SFT and Flow-RWR", LONG[2:], "steps", "long"),
        "beta-best": table("Best of n (steps = n)", ("best-of-n",), "steps", "best"),
    }


def sweep_charts(rows):
    charts = []
    for name, judge in product(SETS, JUDGES):
        series = []
        for method in SCHEDULES:
            query = {"study": "sweep", "method": method, "set": name, "judge": judge}
            points = means(rows, "TA", "beta", BETAS, **query)
            series.append(Series(NAMES[method], BETAS, points))
        title = f"{name.capitalize()} prompts, {judge}"
        charts.append(Chart(title, series, "beta", "win rate in TA", axis="log", level=0.5))
    return charts


def long_charts(rows):
    """Learned and true z-score by drift of each method, and the true by the learned score."""
    steps = sorted({row["steps"] for row in matching(rows, study="long")})
    charts, together = [], []
    for method in ("dpo-constant", "sft", "rwr", "best-of-n", "dpo-schedule"):
        name, query, lengths, distance = NAMES.get(method), {"method": method}, steps, "drift"
        if method == "best-of-n":
            name, lengths, distance = "Best of n", BEST_OF[1:], "KL divergence"
        points = [{"study": "best", "steps": 1}]  # the base model
        points += [query | {"steps": length} for length in lengths]
        drifts = [over_seeds(rows, "drift", judge="oracle", **point)[0] for point in points]
        z = {}
        for judge in JUDGES:
            z[judge] = [over_seeds(rows, "z", judge=judge, **point) for point in points]
        series = [Series(judge, drifts, z[judge]) for judge in JUDGES]
        y = "mean z-score"
        if method == "dpo-schedule":  # its collapse would flatten the others
            y = "mean z-score, wider range"
        else:
            together.append(Series(name, [mean for mean, _ in z["videoreward"]], z["oracle"]))
        charts.append(Chart(name, series, f"{distance} from the base model", y, axis="root"))
    title = "The truth by what VideoReward says"
    return [*charts, Chart(title, together, "VideoReward's z-score", "true z-score")]

"""The tables of README.md that are copied from results/ hold the figures of their study: a test for each."""

import json
import re
from functools import partial
from itertools import product

import evaluate_beta
import evaluate_nrg
import pytest
from readme import ROOT, prose, tables

from data import DIMENSIONS
from evaluate import over_seeds
from studies.jobs import ALIGNED, JUDGES, METHODS
from studies.reward_model import MODELS


def figures_of(result, **wanted):
    return partial(over_seeds, json.loads((ROOT / "results" / f"{result}.json").read_text())["rows"], **wanted)


def check(cell, figure):
    """A cell ".95" or ".95 ± .01" against (mean, sd), to half a unit and a little, as some were rounded twice."""
    for text, value in zip(cell.strip("*").split(" ± "), figure):
        assert abs(float(text) - value) <= 0.55 * 10.0 ** -len(text.partition(".")[2]), f"{cell}, not {value:.4f}"


def which(label, names):
    """The one of `names` whose words, between hyphens, are all in a row's label."""
    words = set(re.findall(r"\w+", label.lower().replace("(1 - t)^2", "schedule")))
    return next((name for name in names if words >= set(name.split("-"))), None)


def rows_of(names):
    """[(label, cells)] of README's first table that has a row for each of `names`."""
    for rows in tables(prose("README.md")):
        if set(names) <= {which(row[0], names) for row in rows}:
            return [(label, cells) for label, *cells in rows]
    pytest.fail(f"README.md has no table with a row for each of {', '.join(names)}")


def test_figures_of_the_comparison():
    figure, align, checked = figures_of("align", set="standard", cfg=1.0), None, set()
    for label, cells in rows_of(METHODS):
        align = next((align for align in ALIGNED if align in label), align)  # a row of its own
        if method := which(label, METHODS):
            for cell, (by, name) in zip(cells, product(JUDGES, DIMENSIONS), strict=True):
                check(cell, figure(name, method=method, align=align, judge=by))
            checked.add((align, method))
    assert checked == set(product(ALIGNED, METHODS))


@pytest.mark.parametrize(("study", "key"), [("sweep", "beta"), ("long", "steps")])
def test_figures_of_beta(study, key):
    figure = figures_of("beta", set="standard", study=study)
    head, *rows = next(rows for rows in tables(prose("README.md")) if rows[0][0] == key)
    rows = [row for row in rows if row[0]]  # without the one that names the schedules
    assert len(rows) == len({"beta": evaluate_beta.BETAS, "steps": evaluate_beta.LENGTHS}[key])
    for row, (i, column) in product(rows, list(enumerate(head))[1:]):
        judge, _, name = column.rpartition(" ")  # "VQ" is a win rate, "true VQ" and "VideoReward VQ" are scores
        wanted = {"judge": judge.lower() if judge == "VideoReward" else "oracle", key: int(row[0])}
        method = evaluate_beta.SCHEDULES[head[:i].count(column)]
        check(row[i], figure(f"{name}_score" if judge else name, method=method, **wanted))


def test_figures_of_the_reward():
    figure, models = figures_of("reward", split="validation", fraction=1.0), ("random", "oracle", *MODELS)
    for label, cells in rows_of(models)[1:]:
        for cell, name in zip(cells, (*DIMENSIONS, "Overall"), strict=True):
            for text, ties in zip(cell.split(" / "), ("with", "without"), strict=True):
                check(text, figure(f"{name}_{ties}", model=which(label, models)))


def test_figures_of_guidance():
    figure = figures_of("nrg", study="weights")
    _, _, *rows = next(rows for rows in tables(prose("README.md")) if rows[0][0] == "VQ : MQ : TA")
    assert len(rows) == len(evaluate_nrg.TABLE_5) + 1
    for label, *cells in rows:
        guided = ":" in label
        method = "nrg-" + ":".join(f"{float(w):g}" for w in label.split(":")) if guided else "CFG 2, no NRG"
        wanted = [figure(name, method=method, judge=by) for by in JUDGES for name in DIMENSIONS]
        wanted += [figure(f"{name}_score", method=method, judge="oracle") for name in DIMENSIONS]
        for cell, value in zip(cells, wanted, strict=True):
            check(cell, value)


def test_costs_are_those_of_the_bench():
    rows = json.loads((ROOT / "results/bench.json").read_text())["rows"]
    seen = {re.sub(r" \([\d,]+ GFLOP/s\)", "", f"{row['part']}: {row['name']}"): row for row in rows}
    (table,) = [rows for rows in tables(prose("README.md")) if "bench.py" in rows[0][0]]
    assert {label for label, *_ in table[1:]} == {
        name for name, row in seen.items() if row["part"] not in ("dense", "memory")
    }
    for label, here, best in table[1:]:
        check(here, [seen[label]["value"]])
        check(best, [seen[label]["floor"]])
    assert max(row["value"] for row in rows if row["part"] == "dense") < 1.02

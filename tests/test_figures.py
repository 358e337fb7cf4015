"""Every figure that is printed holds: results/*.md are what their JSON gives, tables in README.md and docs/ are
compared cell by cell, and every other figure stands in figures.txt, with the row of a result or the command that it
comes from."""

import json
import re
import shlex
from argparse import Namespace
from functools import cache, partial
from itertools import product

import pytest
from figures import FIGURE, agrees, listed, unbound, value
from readme import DOCS, ROOT, TABLE, tables

from data import DIMENSIONS
from evaluate import over_seeds
from studies import align, beta, guidance, observer, online, reward_model, unified
from studies.jobs import ALIGNED, JUDGES, METHODS, mean_z, source
from studies.report.tables import markdown

STUDIES = {"align": align, "beta": beta, "nrg": guidance, "online": online, "reward": reward_model, "unified": unified}
PRINTED = [doc for doc in DOCS if not doc.startswith("examples/")]  # its README computes what it prints

# The tables compared cell by cell: document, and what its first line or one of its rows begins with.
COMPARED = {
    "README.md": ["| aligned 1:1:1 |"],
    "docs/alignment.md": ["| **aligned 1:1:1** |", "| beta |", "| steps |", "| arm, rounds |"],
    "docs/reward.md": ["| random scores |"],
    "docs/guidance.md": ["| VQ : MQ : TA |", "| t |"],
    "docs/unified.md": ["| p_ref |"],
    "docs/scaling.md": ["| `python evaluate.py bench", "| one H200 |"],
}


def compared(doc):
    """The texts of a document's tables that are compared cell by cell."""
    starts = COMPARED.get(doc, [])
    texts = TABLE.findall((ROOT / doc).read_text())
    found = [text for start in starts for text in texts if re.search("^" + re.escape(start), text, re.M)]
    assert len(found) == len(starts), f"{doc} lacks a table with a row that begins with one of {starts}"
    return found


def table(doc, start):
    """(head, rows) of a table of COMPARED; rows of headings alone are left out."""
    head, *rows = next(tables(compared(doc)[COMPARED[doc].index(start)]))
    return head, [row for row in rows if any(re.search(r"\.\d", cell) for cell in row[1:])]


@cache
def result(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def figures_of(name, **wanted):
    return partial(over_seeds, result(name)["rows"], **wanted)


def check(cell, figure):
    """A cell ".95" or ".95 ± .01" against (mean, sd)."""
    for text, number in zip(cell.strip("*").split(" ± "), figure):
        assert agrees(text, number), f"{cell}, not {number:.4f}"


def which(label, names):
    """The one of `names` whose words, between hyphens, are all in a row's label."""
    words = set(re.findall(r"\w+", label.lower().replace("(1 - t)^2", "schedule")))
    return next((name for name in names if words >= set(name.split("-"))), None)


# ---------------------------------------------------------------------------------------------------------------------
# What is not in a compared table


@pytest.mark.parametrize("doc", PRINTED)
def test_every_figure_has_a_source(doc):
    """A failure after a change that is right: `python tests/figures.py` writes the list anew; fill in its commands."""
    found, known = unbound(doc, compared(doc)), listed().get(doc, [])
    assert [(words, [figure.partition("=")[0] for figure in figures]) for words, figures, _ in known] == found
    assert {by for _, _, by in known} - {"", "?"} == {by for _, _, by in known}, "a figure without a command"


@pytest.mark.parametrize("doc", PRINTED)
def test_figures_with_a_query_are_those_of_the_results(doc):
    for words, figures, _ in listed().get(doc, []):
        for figure, sign, query in (figure.partition("=") for figure in figures):
            assert not sign or agrees(figure, value(query)), f"{words}: {figure}, not {value(query):.4f} ({query})"


def test_figures_are_found_and_compared():
    text = "in 62 to 65 % of 192 clips, 3.1 minutes; section 4.2, torch 2.13.0, -.18 ± .02 and 1e-5"
    assert FIGURE.findall(text.replace("section 4.2", "")) == ["62", "65 %", "3.1", "-.18", ".02", "1e-5"]
    assert agrees(".95", 0.9454) and not agrees(".95", 0.9444) and agrees("41 %", 0.414) and not agrees("-.18", 0.18)
    rows = result("align")["rows"]
    wins = [row["TA"] for row in rows if (row["method"], row["align"]) == ("sft", "TA only") and row["set"] == "hard"]
    wins = wins[::2][:6]  # CFG 1, two judges in turn; here the oracle of three seeds, and then CFG 2
    assert value("align:TA/sft/TA only/hard") in [pytest.approx(sum(wins[i::2]) / 3) for i in range(2)]


@pytest.mark.parametrize("name", STUDIES)
def test_a_result_is_what_its_rows_give(name):
    made, text = result(name), (ROOT / f"results/{name}.md").read_text()
    flags = dict(re.findall(r"--([\w-]+)[ =](\S+)", made["command"]))
    args = Namespace(seeds=int(flags.get("seeds", 3)), eval_pairs=int(flags.get("eval-pairs", 2000)), steps=None)
    assert shlex.split(made["command"])[:3] == ["python", "evaluate.py", name]
    assert text.splitlines() == [*markdown(STUDIES[name].report(args, made["rows"])), "", source(made)]


# ---------------------------------------------------------------------------------------------------------------------
# Compared cell by cell


@pytest.mark.parametrize(
    ("doc", "start", "aligned"),
    [("README.md", "| aligned 1:1:1 |", ["1:1:1"]), ("docs/alignment.md", "| **aligned 1:1:1** |", ALIGNED)],
)
def test_figures_of_the_comparison(doc, start, aligned):
    figure, checked = figures_of("align", set="standard", cfg=1.0), []
    methods = list(METHODS)
    _, rows = table(doc, start)
    for i, (label, *cells) in enumerate(rows):
        by_align, method = list(aligned)[i // len(methods)], which(label, methods)
        for cell, (by, name) in zip(cells, product(JUDGES, DIMENSIONS), strict=True):
            check(cell, figure(name, method=method, align=by_align, judge=by))
        checked.append((by_align, method))
    assert checked == list(product(aligned, methods))


@pytest.mark.parametrize(("study", "key"), [("sweep", "beta"), ("long", "steps")])
def test_figures_of_beta(study, key):
    figure = figures_of("beta", set="standard", study=study)
    head, rows = table("docs/alignment.md", f"| {key} |")
    assert len(rows) == len({"beta": beta.BETAS, "steps": beta.LENGTHS}[key])
    for row, (i, column) in product(rows, list(enumerate(head))[1:]):
        judge, _, name = column.rpartition(" ")  # "VQ" is a win rate, "true VQ" and "VideoReward VQ" are scores
        wanted = {"judge": judge.lower() if judge == "VideoReward" else "oracle", key: int(row[0])}
        method = beta.SCHEDULES[head[:i].count(column)]
        check(row[i], figure(f"{name}_score" if judge else name, method=method, **wanted))


def test_figures_of_rounds():
    rows = [row for row in result("online")["rows"] if row["study"] == "judged"]
    rows = [row | {"mean": sum(row[f"{name}_score"] for name in DIMENSIONS) / 3} for row in rows]
    _, shown = table("docs/alignment.md", "| arm, rounds |")
    assert [row[0] for row in shown] == ["base, 0", *(f"{arm}, {n}" for arm, n in product(online.ARMS, (2, 5, 10, 20)))]
    for label, drift, *true, mean, z_true, z_learned in shown:
        arm, _, number = label.partition(", ")
        wanted = {"method": arm, "round": int(number)}
        columns = "drift", *(f"{name}_score" for name in DIMENSIONS), "mean"
        for cell, column in zip((drift, *true, mean), columns, strict=True):
            check(cell, over_seeds(rows, column, judge="oracle", **wanted))
        for cell, by in ((z_true, "oracle"), (z_learned, "videoreward")):
            check(cell, (mean_z(rows, by, **wanted), 0.0))


def test_figures_of_the_reward():
    figure, models = figures_of("reward", split="validation", fraction=1.0), ("random", "oracle", *reward_model.MODELS)
    _, rows = table("docs/reward.md", "| random scores |")
    assert [which(label, models) for label, *_ in rows] == list(models)
    for label, *cells in rows:
        for cell, name in zip(cells, (*DIMENSIONS, "Overall"), strict=True):
            for text, ties in zip(cell.split(" / "), ("with", "without"), strict=True):
                check(text, figure(f"{name}_{ties}", model=which(label, models)))


def test_figures_of_guidance():
    figure = figures_of("nrg", study="weights")
    _, rows = table("docs/guidance.md", "| VQ : MQ : TA |")
    assert len(rows) == len(guidance.TABLE_5) + 1
    for label, *cells in rows:
        guided = ":" in label
        method = "nrg-" + ":".join(f"{float(w):g}" for w in label.split(":")) if guided else "CFG 2, no NRG"
        wanted = [figure(name, method=method, judge=by) for by in JUDGES for name in DIMENSIONS]
        wanted += [figure(f"{name}_score", method=method, judge="oracle") for name in DIMENSIONS]
        for cell, number in zip(cells, wanted, strict=True):
            check(cell, number)


def test_figures_of_what_is_told_apart():
    figure, (head, rows) = figures_of("nrg", study="told"), table("docs/guidance.md", "| t |")
    readers = {"ideal": "ideal", "probe, 2 blocks": "probe 2", "probe, 4 blocks": "probe 4", "reward": "noised"}
    assert [row[0] for row in rows] == [f"{a}, {r}" for a, r in product(("colour", "shape", "direction"), readers)]
    assert [float(t) for t in head[1:]] == list(observer.TIMES)
    for (label, *cells), (i, t) in product(rows, enumerate(observer.TIMES)):
        name, _, reader = label.partition(", ")
        check(cells[i], figure(name, variant=readers[reader], t=t))


def test_figures_of_the_line():
    figure, (_, (first, *rows)) = figures_of("unified"), table("docs/unified.md", "| p_ref |")
    share, mean = unified.truth()
    check(first[2], [mean])
    check(first[3], [share[unified.EDGES[:-1] > -1e-6].sum().item()])
    dpo = [f"dpo-{b:g}" for b in unified.DPO_BETAS]
    methods = ["reference"], ["rwr"], dpo, ["nrg-exact"], ["nrg-shared"], ["nrg-own"]
    assert rows[2][0].endswith(" / ".join(f"{b:g}" for b in unified.DPO_BETAS))
    for (_, *cells), group in zip(rows, methods, strict=True):
        for cell, column in zip(cells, ("distance", "mean", "right"), strict=True):
            for text, method in zip(cell.split(" / "), group, strict=True):
                check(text, figure(column, method=method))


@pytest.mark.parametrize(("name", "start"), [("bench", "| `python evaluate.py bench"), ("bench_h200", "| one H200 |")])
def test_costs_are_those_of_the_bench(name, start):
    rows = result(name)["rows"]
    seen = {re.sub(r" \([\d,]+ GFLOP/s\)", "", f"{row['part']}: {row['name']}"): row for row in rows}
    _, table_rows = table("docs/scaling.md", start)
    assert {label for label, *_ in table_rows} == {
        name for name, row in seen.items() if row["part"] not in ("dense", "memory")
    }
    for label, here, best in table_rows:
        check(here, [seen[label]["value"]])
        check(best, [seen[label]["floor"]])
    assert max(row["value"] for row in rows if row["part"] == "dense") < 1.04

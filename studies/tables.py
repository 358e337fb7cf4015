"""Writes the tables and the excerpts of code in README.md and docs/, results/*.md, the charts and
docs/annotated.html.

    python evaluate.py tables             writes every file whose contents would change
    python evaluate.py tables --check     writes nothing; an outdated file is an error

Three things in a document are generated:

    <!-- table: NAME -->                  a table from results/*.json; NAME is a key of TABLES below
    <!-- end of table -->

    <!-- code: FILE | FIRST | LAST -->    lines of FILE, from the one that begins with FIRST to the
    <!-- end of code -->                  next one that begins with LAST, and a link to them

    [`module.name`](file.py#L12)          the line number of a link to a definition
"""

import json
import os
import re
import textwrap
from itertools import product
from pathlib import Path

from data import DIMENSIONS
from judge import over_seeds
from pages import annotated
from runtime.cli import BadInput
from sample import CFG, NRG_SCALE
from studies import align, beta, guidance, observer, online, rank, reward_model, unified
from studies.jobs import BEST_OF, JUDGES, METHODS, arguments, mean_z, rendered
from studies.report.tables import Table, plus_minus, table_lines

ROOT = Path(__file__).resolve().parents[1]
STUDIES = {
    "align": align,
    "beta": beta,
    "nrg": guidance,
    "online": online,
    "rank": rank,
    "reward": reward_model,
    "unified": unified,
}
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

CODE = re.compile(r"(<!-- code: (\S+) \| (.+?) \| (.+?) -->\n).*?(<!-- end of code -->)", re.DOTALL)
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L\d+\)")

SCORES = [f"{name}_score" for name in DIMENSIONS]
WINS_BY_JUDGE = [f"{name}, {judge}" for judge in ("truth", "VideoReward") for name in DIMENSIONS]
METHOD_NAMES = {
    "base": "base model",
    "sft": "SFT",
    "rwr": "Flow-RWR",
    "dpo-schedule": "Flow-DPO, (1-t)^2",
    "dpo-constant": "Flow-DPO, constant beta",
    "dpo-own-clips": "Flow-DPO, own clips",
}


def load(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def mean(rows, column, digits=2, **query):
    return f"{over_seeds(rows, column, **query)[0]:.{digits}f}"


def mean_and_sd(rows, column, digits=2, **query):
    return plus_minus(over_seeds(rows, column, **query), digits)


def wins_by_judge(rows, **query):
    """Win rates in the columns of WINS_BY_JUDGE."""
    return [
        mean_and_sd(rows, name, judge=judge, **query) for judge in JUDGES for name in DIMENSIONS
    ]


# ---------------------------------------------------------------------------------------------
# The tables: each function returns a Table


def win_rates(aligned):
    """Win rates over the base model by both judges: standard set, CFG 1."""
    rows = load("align")["rows"]
    query = {"align": aligned, "set": "standard", "cfg": 1.0}
    cells = []
    for method in METHODS:
        cells.append([METHOD_NAMES[method], *wins_by_judge(rows, method=method, **query)])
    return Table("", [f"aligned {aligned}", *WINS_BY_JUDGE], cells)


def summary():
    """Win rates of the main methods over the base model, CFG 1, by both judges."""
    aligned, guided = load("align")["rows"], load("nrg")["rows"]
    query = {"align": "1:1:1", "set": "standard", "cfg": 1.0}
    cells = [["base model", *["0.50"] * 6]]
    for method in ("sft", "rwr", "dpo-schedule", "dpo-constant"):
        cells.append([METHOD_NAMES[method], *wins_by_judge(aligned, method=method, **query)])
    wins = wins_by_judge(guided, study="weights", method="nrg-1:1:1")
    cells.append(["Flow-NRG, 1:1:1", *wins])
    return Table("", ["", *WINS_BY_JUDGE], cells)


def true_scores():
    """What the oracle says of every method aligned 1:1:1: standard set, CFG 1, and two of them at CFG 2."""
    rows = [
        row | {"wins": sum(row[name] for name in DIMENSIONS) / 3}
        for row in load("align")["rows"]
        if row["align"] in ("", "1:1:1")
    ]
    columns = [*SCORES, "TA_share", "shape", "quality"]
    methods = ["base", *METHODS, *(f"best-of-{n}" for n in BEST_OF[1:])]
    cells = []
    for method, cfg in [
        *((method, 1.0) for method in methods),
        ("base", CFG),
        ("dpo-constant", CFG),
    ]:
        query = {"method": method, "set": "standard", "cfg": cfg, "judge": "oracle"}
        label = METHOD_NAMES.get(method, method.replace("-", " "))
        if cfg != 1.0:
            label += f", CFG {cfg:g}"
        values = [mean(rows, column, **query) for column in columns]
        cells.append([label, mean_and_sd(rows, "wins", **query), *values])
    head = ["", "mean of three true wins", *(f"true {name}" for name in DIMENSIONS)]
    return Table("", [*head, "share of TA wins", "shapes right", "static quality"], cells)


def beta_table(study, key):
    """Drift, win rates and VQ scores at each value of `key`, for both schedules."""
    rows = [row for row in load("beta")["rows"] if row["study"] == study]
    values = sorted({row[key] for row in rows})
    cells = []
    for method, value in product(beta.SCHEDULES, values):
        query = {"method": method, key: value, "set": "standard"}
        wins = [mean(rows, name, judge="oracle", **query) for name in DIMENSIONS]
        scores = [mean(rows, "VQ_score", judge=judge, **query) for judge in JUDGES]
        drift = mean(rows, "drift", 3, judge="oracle", **query)
        cells.append([METHOD_NAMES[method], str(value), drift, *wins, *scores])
    return Table("", ["method", key, "drift", *DIMENSIONS, "true VQ", "VideoReward's VQ"], cells)


def rounds():
    """True and learned scores of online alignment after 2, 5, 10 and 20 rounds."""
    rows = [row for row in load("online")["rows"] if row["study"] == "judged"]
    rows = [row | {"mean": sum(row[score] for score in SCORES) / 3} for row in rows]
    cells = []
    for arm, number in [("base", 0), *product(online.ARMS, (2, 5, 10, 20))]:
        query = {"method": arm, "round": number, "judge": "oracle"}
        scores = [mean_and_sd(rows, score, **query) for score in SCORES]
        z_scores = [f"{mean_z(rows, judge, method=arm, round=number):.2f}" for judge in JUDGES]
        average = mean_and_sd(rows, "mean", 3, **query)
        cells.append(
            [arm, str(number), mean(rows, "drift", 3, **query), *scores, average, *z_scores]
        )
    true = [f"true {name}" for name in DIMENSIONS]
    return Table("", ["arm", "rounds", "drift", *true, "mean", "true z", "learned z"], cells)


def reward_losses():
    """Validation accuracy of VideoReward by its loss, with ties / without."""
    names = {
        "random": "random scores",
        "oracle": "the oracle",
        "regression": "regression on ratings",
        "bt-shared": "BT, one shared token",
        "btt-shared": "BTT, one shared token",
        "btt-separate": "BTT, separate tokens (the default)",
    }
    rows = load("reward")["rows"]
    columns = (*DIMENSIONS, "Overall")
    cells = []
    for model, label in names.items():
        query = {"model": model, "split": "validation", "fraction": 1.0}
        cells.append([label])
        for column in columns:
            with_ties = mean(rows, f"{column}_with", 3, **query)
            without = mean(rows, f"{column}_without", 3, **query)
            cells[-1].append(f"{with_ties} / {without}")
    return Table("", ["with ties / without", *columns], cells)


def reward_pairs():
    """VideoReward's true accuracy by the kind of clips, trained with and without generated clips."""
    splits = {
        "validation": "rendered clips",
        "benchmark": "rendered clips, held-out combinations",
        "base": "the base model's clips",
        "policy": "clips of a Flow-DPO policy",
        "cfg3": "the base model's clips at CFG 3",
    }
    models = {
        "btt-separate": "half generated",
        **dict.fromkeys(reward_model.RENDERED_ONLY, "rendered"),
    }
    rows = load("reward")["rows"]
    cells = []
    for split, label in splits.items():
        values = [
            mean_and_sd(rows, f"{name}_true", 3, model=model, split=split, fraction=1.0)
            for model in models
            for name in DIMENSIONS
        ]
        cells.append([label, *values])
    head = [f"{name}, {kind}" for kind in models.values() for name in DIMENSIONS]
    return Table("", ["pairs of", *head], cells)


def guidance_table(head, queries):
    """Flow-NRG: true win rates over the unguided base model, and true scores. queries: {label: query}."""
    rows = load("nrg")["rows"]
    cells = []
    for label, query in queries.items():
        query = query | {"judge": "oracle"}
        wins = [mean_and_sd(rows, name, **query) for name in DIMENSIONS]
        scores = [mean(rows, score, **query) for score in SCORES]
        cells.append([label, *wins, *scores])
    return Table("", [head, *DIMENSIONS, *(f"true {name}" for name in DIMENSIONS)], cells)


def guidance_weights():
    """Flow-NRG by its weights: win rates over the unguided base model by both judges."""
    rows = load("nrg")["rows"]
    methods = {
        " : ".join(f"{w:g}" for w in weights): guidance.name_of(weights)
        for weights in guidance.TABLE_5
    }
    methods["no guidance, CFG 2"] = "CFG 2, no NRG"
    cells = []
    for label, method in methods.items():
        query = {"study": "weights", "method": method}
        wins = wins_by_judge(rows, **query)
        scores = [mean(rows, score, judge="oracle", **query) for score in SCORES]
        cells.append([label, *wins, *scores])
    return Table(
        "", ["VQ : MQ : TA", *WINS_BY_JUDGE, *(f"true {name}" for name in DIMENSIONS)], cells
    )


def guidance_alone():
    """One weight alone, rising."""
    queries = {}
    for i, weight in product(range(3), guidance.RISING):
        weights = [0, 0, 0]
        weights[i] = weight
        method = guidance.name_of(weights)
        queries[" : ".join(f"{w:g}" for w in weights)] = {"study": "one", "method": method}
    return guidance_table("VQ : MQ : TA", queries)


def guidance_settings():
    """Weights 1 : 1 : 1 at other scales and up to other t."""
    queries = {}
    for factor in sorted((*guidance.SCALES, 1)):
        scale = factor * NRG_SCALE
        query = {"study": "scale", "scale": scale}
        if factor == 1:
            query = {"study": "weights", "method": "nrg-1:1:1"}
        queries[f"scale {scale:g}"] = query
    for highest in guidance.HIGHEST:
        query = {"study": "interval", "method": "nrg-1:1:1", "highest": highest}
        queries[f"scale {NRG_SCALE:g}, guided up to t = {highest:g}"] = query
    return guidance_table("", queries)


def guidance_rewards():
    """Weights 1 : 1 : 1 and MQ alone by what the noise-aware reward has learned from."""
    names = {
        "noised": "VideoReward's scores",
        "labels": "people's labels",
        "clean": "clean clips only",
    }
    queries = {}
    for variant, weights in product(names, ((1, 1, 1), (0, 1, 0))):
        study = "reward"
        if variant == "noised":
            study = "weights" if weights == (1, 1, 1) else "one"
        label = f"{names[variant]}, {' : '.join(map(str, weights))}"
        queries[label] = {"study": study, "variant": variant, "method": guidance.name_of(weights)}
    return guidance_table("learned from, weights", queries)


def guidance_on_top():
    """Flow-NRG on top of Flow-DPO and of CFG; win rates are over the base model at the same CFG."""
    queries = {}
    for cfg, method in product((1.0, CFG), ("dpo", "dpo+nrg-1:1:1")):
        label = "Flow-DPO" if method == "dpo" else "Flow-DPO and Flow-NRG 1 : 1 : 1"
        queries[f"{label}, CFG {cfg:g}"] = {"study": "on top", "method": method, "cfg": cfg}
    query = {"study": "on top", "method": "cfg+nrg-1:1:1", "cfg": CFG}
    queries[f"Flow-NRG 1 : 1 : 1, CFG {CFG:g}"] = query
    return guidance_table("", queries)


def attributes_under_noise():
    """Two-way accuracy for each attribute at each t: ideal observer, probes and the reward."""
    readers = {
        "ideal": "ideal observer",
        **{f"probe {n}": f"linear probe on {n} blocks" for n in observer.BLOCKS},
        "noised": "noise-aware reward",
    }
    rows = load("nrg")["rows"]
    cells = []
    for attribute, reader in product(("colour", "shape", "direction"), readers):
        query = {"study": "told", "variant": reader}
        values = [mean_and_sd(rows, attribute, t=t, **query) for t in observer.TIMES]
        cells.append([attribute, readers[reader], *values])
    return Table("", ["attribute", "reader", *(f"t {t:g}" for t in observer.TIMES)], cells)


def mixture():
    """The three algorithms on the line where p* is known."""
    rows = load("unified")["rows"]
    names = {
        "reference": "p_ref",
        "rwr": "Flow-RWR",
        **{f"dpo-{beta:g}": f"Flow-DPO, its beta {beta:g}" for beta in unified.DPO_BETAS},
        "nrg-exact": "Flow-NRG, exact value function",
        "nrg-shared": "Flow-NRG, reward learned with the same noise for both clips",
        "nrg-own": "Flow-NRG, reward learned with separate noise",
    }
    share, target_mean = unified.truth()
    right = share[unified.EDGES[:-1] > -1e-6].sum()
    cells = [["p*", "0", f"{target_mean:.3f}", f"{right:.3f}"]]
    for method, label in names.items():
        columns = ("distance", "mean", "right")
        cells.append([label, *(mean_and_sd(rows, column, 3, method=method) for column in columns)])
    return Table("", ["", "distance to p*", "mean", "mass above 0"], cells)


def costs(name):
    """Measured costs beside the best that is possible."""
    cells = []
    for row in load(name)["rows"]:
        if row["part"] in ("dense", "memory"):
            continue
        what = re.sub(r" \([\d,]+ GFLOP/s\)", "", row["name"])
        measured = row["value"]
        digits = f"{measured:.2f}" if measured >= 0.1 else f"{measured:.2g}"
        cells.append([row["part"], what, digits, f"{row['floor']:.3g}"])
    return Table("", ["part", "ratio", "measured", "at best"], cells)


TABLES = {
    "summary": summary,
    "align": lambda: win_rates("1:1:1"),
    "align-ta": lambda: win_rates("TA only"),
    "align-true": true_scores,
    "beta-sweep": lambda: beta_table("sweep", "beta"),
    "beta-long": lambda: beta_table("long", "steps"),
    "online": rounds,
    "reward-losses": reward_losses,
    "reward-pairs": reward_pairs,
    "nrg-weights": guidance_weights,
    "nrg-alone": guidance_alone,
    "nrg-settings": guidance_settings,
    "nrg-rewards": guidance_rewards,
    "nrg-on-top": guidance_on_top,
    "nrg-noise": attributes_under_noise,
    "rank": lambda: rank.table(load("rank")["rows"]),
    "unified": mixture,
}


# ---------------------------------------------------------------------------------------------
# The files


def with_tables(text, path):
    """A document's text with its tables written anew. BadInput for an unknown table."""

    def block(match):
        name = match[2]
        if name not in TABLES:
            raise BadInput(f"{path}: unknown table {name!r}; known: {', '.join(TABLES)}")
        return match[1] + "\n".join(table_lines(TABLES[name]())) + "\n" + match[3]

    return BLOCK.sub(block, text)


def excerpt(match, path):
    """A block of code lines with a link to them. BadInput if the file has no such lines."""
    file, first, last = match[2], match[3], match[4]
    lines = (ROOT / file).read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.strip().startswith(first)]
    if len(starts) != 1:
        raise BadInput(f"{path}: {len(starts)} lines of {file} begin with {first!r}; one is needed")
    ends = [i for i in range(starts[0], len(lines)) if lines[i].strip().startswith(last)]
    if not ends:
        raise BadInput(f"{path}: no line of {file} after {first!r} begins with {last!r}")
    start, stop = starts[0], ends[0] + 1
    code = textwrap.dedent("\n".join(lines[start:stop]))
    link = f"{os.path.relpath(ROOT / file, path.parent)}#L{start + 1}-L{stop}"
    caption = f"[{file}, lines {start + 1} to {stop}]({link})"
    return f"{match[1]}{caption}\n\n```python\n{code}\n```\n{match[5]}"


def definition_link(match, path):
    """A link to the line that defines a name. BadInput if no line does."""
    name, file = match[1], match[2]
    last = name.split(".")[-1]
    definition = re.compile(rf"\s*(def|class) {last}\b|{last}(:[^=]*)? =")
    for number, line in enumerate((path.parent / file).read_text().splitlines(), 1):
        if definition.match(line):
            return f"[`{name}`]({file}#L{number})"
    raise BadInput(f"{path}: {file} does not define {name}")


def generated(path):
    """The text of a document with its tables, excerpts and line numbers written anew."""
    text = with_tables(path.read_text(), path)
    text = CODE.sub(lambda match: excerpt(match, path), text)
    return LINK.sub(lambda match: definition_link(match, path), text)


def bench_page():
    """results/bench.md: every measured cost beside the best that is possible."""
    lines = ["# What costs how much", "", "Ratios measured by `python evaluate.py bench`."]
    for name in ("bench", "bench_h200"):
        saved = load(name)
        source = "`{command}`, commit {commit}, torch {torch}, {device}".format(**saved)
        lines += ["", f"## {name}", "", source, "", *table_lines(costs(name))]
    return "\n".join([*lines, ""])


def generated_files():
    """{path: text} of every file that is made from results/*.json."""
    files = {}
    for name, study in STUDIES.items():
        saved = load(name)
        args = arguments(saved["command"].split()[2:])
        for file, text in rendered(name, study.report(args, saved["rows"]), saved).items():
            files[ROOT / "results" / file] = text
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        files[path] = generated(path)
    files[ROOT / "results" / "bench.md"] = bench_page()
    files[ROOT / "docs" / "annotated.html"] = annotated.page()
    return files


def run(args, device):
    outdated = {}
    for path, text in generated_files().items():
        if not path.exists() or path.read_text() != text:
            outdated[path] = text
    names = ", ".join(str(path.relative_to(ROOT)) for path in outdated)
    if args.check:
        if outdated:
            raise BadInput(f"{names}: not up to date; run `python evaluate.py tables`")
        return
    for path, text in outdated.items():
        path.write_text(text)
    print(f"wrote {names}" if outdated else "every table is up to date")

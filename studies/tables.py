"""Writes everything that is generated: tables, excerpts of code and line links in README.md and
docs/, results/*.md, the charts, and docs/annotated.html.

    python evaluate.py tables             writes every file whose contents would change
    python evaluate.py tables --check     writes nothing; an outdated file is an error

Three things in a document are generated:

    <!-- table: NAME -->                  a table of a study, by its key in the study's tables()
    <!-- end of table -->

    <!-- code: FILE | FIRST | LAST -->    lines of FILE, from the one that begins with FIRST to the
    <!-- end of code -->                  next one that begins with LAST, and a link to them

    [`module.name`](file.py#L12)          the line number of a link to a definition
"""

import os
import re
import textwrap
from functools import cache

from pages import annotated
from runtime.cli import BadInput
from studies.catalogue import ROOT, STUDIES
from studies.jobs import load_result, rendered, settings_of, source_line
from studies.policies import NAMES, WINS_BY_JUDGE
from studies.report.tables import Table, matching, table_lines, tabulate

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
CODE = re.compile(r"(<!-- code: (\S+) \| (.+?) \| (.+?) -->\n).*?(<!-- end of code -->)", re.DOTALL)
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L\d+\)")


@cache
def load(name):
    return load_result(ROOT / "results" / f"{name}.json")


@cache
def report(name):
    """The report of a study's saved result."""
    saved = load(name)
    return STUDIES[name].report(settings_of(saved["command"].split()[2:]), saved["rows"])


# ---------------------------------------------------------------------------------------------
# Tables


def tables():
    """{name: Table} of all studies."""
    found = {"summary": summary()}
    for name in STUDIES:
        found |= report(name)["tables"]
    return found


def summary():
    """Win rates of the main methods over the base model, CFG 1, by both judges."""
    rows = matching(load("align")["rows"], align="1:1:1", set="standard", cfg=1.0)
    methods = ("sft", "rwr", "dpo-schedule", "dpo-constant", "nrg-1:1:1")
    lines = {NAMES[method]: {"method": method} for method in methods}
    table = tabulate("", [""], rows, lines, WINS_BY_JUDGE)
    base = [NAMES["base"], *["0.50"] * 6]
    return Table("", table.head, [base, *table.rows])


def costs(name):
    """Measured costs beside the best that is possible."""
    cells = []
    for row in load(name)["rows"]:
        if row["part"] not in ("dense", "memory"):
            label = re.sub(r" \([\d,]+ GFLOP/s\)", "", row["name"])
            digits = ".2f" if row["value"] >= 0.1 else ".2g"
            cells.append([row["part"], label, f"{row['value']:{digits}}", f"{row['floor']:.3g}"])
    return Table("", ["part", "ratio", "measured", "at best"], cells)


# ---------------------------------------------------------------------------------------------
# The files


def with_table(match, path, known):
    """A block with its table. BadInput for an unknown one."""
    if match[2] not in known:
        raise BadInput(f"{path}: unknown table {match[2]!r}; known: {', '.join(known)}")
    return match[1] + "\n".join(table_lines(known[match[2]])) + "\n" + match[3]


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


def generated(path, known):
    """The text of a document with its tables, excerpts and line numbers written anew."""
    text = BLOCK.sub(lambda match: with_table(match, path, known), path.read_text())
    text = CODE.sub(lambda match: excerpt(match, path), text)
    return LINK.sub(lambda match: definition_link(match, path), text)


def bench_page():
    """results/bench.md: every measured cost beside the best that is possible."""
    lines = ["# What costs how much", "", "Ratios measured by `python evaluate.py bench`, which at"]
    lines.append("the commits below had more parts.")
    for name in ("bench", "bench_h200"):
        lines += ["", f"## {name}", "", source_line(load(name)), "", *table_lines(costs(name))]
    return "\n".join([*lines, ""])


def generated_files():
    """{path: text} of every file that is generated."""
    load.cache_clear()
    report.cache_clear()
    files = {}
    for name in STUDIES:
        for file, text in rendered(name, report(name), load(name)).items():
            files[ROOT / "results" / file] = text
    known = tables()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        files[path] = generated(path, known)
    files[ROOT / "results" / "bench.md"] = bench_page()
    files[ROOT / "docs" / "annotated.html"] = annotated.page()
    return files


def run(settings):
    outdated = {}
    for path, text in generated_files().items():
        if not path.exists() or path.read_text() != text:
            outdated[path] = text
    names = ", ".join(str(path.relative_to(ROOT)) for path in outdated)
    if settings.check:
        if outdated:
            raise BadInput(f"{names}: not up to date; run `python evaluate.py tables`")
        return
    for path, text in outdated.items():
        path.write_text(text)
    print(f"wrote {names}" if outdated else "every table is up to date")

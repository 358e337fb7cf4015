"""Where every figure of the Markdown files comes from: results/*.json, or a command named in figures.txt.

A block is a paragraph, a point of a list, a row of a table or a fence's output. figures.txt has a line for each block
that holds figures, but for tables that test_figures.py compares cell by cell:

    <the block's first words> | <figure> <figure>=<query> ...

Above them stands the document, and above each group the command that measured what has no query. A query names a column
of a result and the values of a row: "align:TA/dpo-constant/videoreward" is the mean over the seeds of column TA in
results/align.json; "@sd" behind it asks for the spread; DEFAULTS has what a query leaves out; "mean" is that of VQ, MQ
and TA, "mean_with" that of VQ_with, MQ_with and TA_with; "_" in a value stands for a space.

    python tests/figures.py          writes figures.txt anew, with queries and commands kept where the block's words are
"""

import json
import re
import statistics
import sys
from functools import cache
from pathlib import Path

from readme import DOCS, FENCE, ROOT

FILE = Path(__file__).with_name("figures.txt")
FIGURE = re.compile(
    r"(?<![\w.,/^-])[-+]?(?:"
    r"\d*\.\d+(?:e[+-]?\d+)?(?![\w.]*\d)|\d+e[+-]?\d+|"  # .95, 1.5, 6.43e+15, not 2.13.0
    r"\d[\d,]*(?= (?:to|and|or) [\d.,]+ (?:%|minutes|seconds))|\d[\d,]* %|"  # 62 to 65 %
    r"\d[\d,]*(?= (?:minutes?|seconds?|s|hours?|GB|MB|GiB|GFLOP/s|M|times)\b))"  # 55 minutes
)
REFERENCE = re.compile(  # to the paper
    r"(?:[Ss]ections?|appendi(?:x|ces)) \d\.\d(?:(?:,| and) \d\.\d)*|arXiv \d+\.\d+|"
    r"\(\d\.\d(?:, [^)]*)?\)|\| \d\.\d(?=,| \|)"
)
COMMAND = re.compile(r"^ *(?:\$ )?(?:python|torchrun|pip|for) [^#]*", re.M)
DEFAULTS = {
    "align": {"set": "standard", "cfg": 1.0, "align": "1:1:1", "judge": "oracle"},
    "beta": {"set": "standard", "judge": "oracle"},
    "nrg": {"judge": "oracle", "variant": "noised"},
    "online": {"study": "judged", "judge": "oracle"},
    "reward": {"split": "validation", "fraction": 1.0},
    "unified": {},
    "bench": {},
}


def blocks(text):
    """[(first words, figures)] of a Markdown text, in order, for each block that holds figures."""
    found, last = [], 0
    for fence in [*FENCE.finditer(text), None]:
        plain = text[last : fence.start() if fence else len(text)]
        plain = re.sub(r"`[^`]*`|\]\([^)]*\)|^#.*$", " ", plain, flags=re.M)
        found += re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\|))", plain)
        if fence:
            output = [COMMAND.sub("", line) for line in fence[2].splitlines()]
            found.append("\n".join(output) if fence[1] == "" else "")
            last = fence.end()
    for block in found:
        if figures := FIGURE.findall(REFERENCE.sub(" ", block)):
            words = re.sub(r"[\s|*±]+", " ", FIGURE.sub(" ", REFERENCE.sub(" ", block))).strip(" -,.()")
            yield words[:40].strip(), [" ".join(figure.split()) for figure in figures]


def mean_and_spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@cache
def rows(result):
    return json.loads((ROOT / f"results/{result}.json").read_text())["rows"]


def value(query):
    """The number that a query asks for."""
    query, _, kind = query.partition("@")
    result, _, path = query.partition(":")
    column, *words = path.split("/")
    words = [word.replace("_", " ") for word in words]
    wanted, here = dict(word.split("=") for word in words if "=" in word), rows(result)
    for word in words:
        if "=" not in word:
            keys = {key for row in here for key, value in row.items() if text(value) == word and isinstance(value, str)}
            assert len(keys) == 1, f"{word} of {query} is a value of {keys or 'nothing'}"
            wanted[keys.pop()] = word
    here = [row for row in here if all(text(row.get(key, "")) == value for key, value in wanted.items())]
    usual = {key: value for key, value in DEFAULTS[result].items() if key not in wanted}
    here = [row for row in here if all(row.get(key, value) == value for key, value in usual.items())]
    assert here, f"no row for {query}"
    columns = [n + column[4:] for n in ("VQ", "MQ", "TA")] if column.startswith("mean") else [column]
    assert len({row.get("seed") for row in here}) == len(here), f"{query} fits several rows of one seed"
    mean, spread = mean_and_spread([sum(row[name] for name in columns) / len(columns) for row in here])
    return spread if kind == "sd" else mean


def text(value):
    return f"{value:g}" if isinstance(value, (int, float)) else value


def agrees(figure, number):
    """Whether a printed figure is `number`, to half a unit of its last digit and a little, as some are rounded
    twice."""
    percent = figure.endswith("%")
    digits = figure.removesuffix("%").strip().replace(",", "")
    return abs(float(digits) - number * (100 if percent else 1)) <= 0.55 * 10.0 ** -len(digits.partition(".")[2])


def listed():
    """{document: [(first words, [figure or figure=query], command)]} of figures.txt."""
    found, command = {}, ""
    for line in FILE.read_text().splitlines():
        if line.startswith("== "):
            entries = found[line[3:]] = []
        elif line.startswith("$ "):
            command = line[2:]
        elif line:
            words, _, figures = line.rpartition(" | ")
            entries.append((words, re.findall(r"[^\s=]+(?: %)?(?:=\S+)?", figures), command))
    return found


def unbound(doc, tables=()):
    """`blocks` of a document without the rows of the tables that are compared cell by cell (their text)."""
    source = (ROOT / doc).read_text()
    for table in tables:
        source = source.replace(table, "\n")
    return list(blocks(source))


def write(tables):
    old, lines = listed() if FILE.exists() else {}, []
    for doc in DOCS:
        if doc.startswith("examples/"):
            continue
        entries, command = {}, None
        for words, figures, by in old.get(doc, []):
            entries.setdefault(words, []).append((figures, by))
        lines += ["", f"== {doc}"]
        for words, figures in unbound(doc, tables(doc)):
            known, by = entries[words].pop(0) if entries.get(words) else ([], command or "?")
            queries = [figure.partition("=")[2] for figure in known]
            queries = queries if len(queries) == len(figures) else [""] * len(figures)
            if by != command:
                lines.append(f"$ {by}")
                command = by
            lines.append(f"{words} | " + " ".join(f"{f}={q}" if q else f for f, q in zip(figures, queries)))
    FILE.write_text("\n".join(lines[1:]) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from test_figures import compared

    write(compared)

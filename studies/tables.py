"""Writes everything that is generated: tables, excerpts of code and line links in README.md and
docs/, results/*.md, the charts, and docs/annotated.html.

    python evaluate.py tables             writes every file whose contents would change
    python evaluate.py tables --check     writes nothing; an outdated file is an error

Three things in a document are generated:

    <!-- table: NAME -->                  a table of a study, by its key in the study's report
    <!-- end of table -->

    <!-- code: FILE | FIRST | LAST -->    lines of FILE, from the one that begins with FIRST to the
    <!-- end of code -->                  next one that begins with LAST, and a link to them

    [`module.name`](file.py#L12)          the line number of a link to a definition
"""

import json
import os
import re
import textwrap

from pages import annotated
from runtime.cli import BadInput
from studies import bench
from studies.catalogue import ROOT, STUDIES
from studies.jobs import rendered, report_of
from studies.report.tables import table_lines

TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
CODE = re.compile(r"(<!-- code: (\S+) \| (.+?) \| (.+?) -->\n).*?(<!-- end of code -->)", re.DOTALL)
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L\d+\)")


def load(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def with_excerpt(match, path):
    """A block with its lines of code and a link to them."""
    head, file, first, last, end = match.groups()
    lines = (ROOT / file).read_text().splitlines()
    starts = [line.strip().startswith(first) for line in lines]
    if starts.count(True) != 1:
        raise BadInput(f"{path}: {starts.count(True)} lines of {file} begin with {first!r}")
    start = stop = starts.index(True)
    while not lines[stop].strip().startswith(last):
        stop += 1
    code = textwrap.dedent("\n".join(lines[start : stop + 1]))
    link = f"{os.path.relpath(ROOT / file, path.parent)}#L{start + 1}-L{stop + 1}"
    caption = f"[{file}, lines {start + 1} to {stop + 1}]({link})"
    return f"{head}{caption}\n\n```python\n{code}\n```\n{end}"


def with_line(match, path):
    """A link to the line that defines a name."""
    name, file = match.groups()
    last = name.split(".")[-1]
    definition = re.compile(rf"\s*(def|class) {last}\b|{last}(:[^=]*)? =")
    for number, line in enumerate((path.parent / file).read_text().splitlines(), 1):
        if definition.match(line):
            return f"[`{name}`]({file}#L{number})"
    raise BadInput(f"{path}: {file} does not define {name}")


def generated(path, tables):
    """The text of a document with its tables, excerpts and line numbers written anew."""

    def with_table(match):
        head, name, end = match.groups()
        return head + "\n".join(table_lines(tables[name])) + "\n" + end

    text = TABLE.sub(with_table, path.read_text())
    text = CODE.sub(lambda match: with_excerpt(match, path), text)
    return LINK.sub(lambda match: with_line(match, path), text)


def generated_files():
    """{path: text} of every file that is generated."""
    files = {ROOT / "docs" / "annotated.html": annotated.page()}
    tables = {"bench": bench.table({name: load(name)["rows"] for name in bench.RESULTS})}
    for name, study in STUDIES.items():
        if not (ROOT / "results" / f"{name}.json").exists():
            continue
        saved = load(name)
        tables |= report_of(study, saved).tables
        for file, text in rendered(study, name, saved).items():
            files[ROOT / "results" / file] = text
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        files[path] = generated(path, tables)
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

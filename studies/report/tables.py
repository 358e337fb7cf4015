"""Tables of a study, as it makes them: for its Markdown file and for the page, which both show the same cells."""

import math
from typing import NamedTuple


class Table(NamedTuple):
    """Cells as text, the first of a row its name. kind "findings": the paper's claims held against figures."""

    title: str
    head: list
    rows: list
    kind: str = ""


def plus_minus(value, digits=2):
    """(mean, spread) -> "0.97 ± 0.02", or "nan" for a figure that is not there."""
    return "nan" if math.isnan(value[0]) else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def _row(cells):
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells).replace(" nan |", " – |")


def table_lines(table):
    """A table as Markdown lines, without its title."""
    return [_row(table.head), "|" + "---|" * len(table.head), *map(_row, table.rows)]


def markdown(result):
    """Lines of a study's result: its title, introduction (lines) and tables."""
    lines = [f"# {result['title']}"]
    lines += ["", *result["introduction"]] if result["introduction"] else []
    for table in result["tables"]:
        lines += ["", f"## {table.title}"] if table.title else []
        lines += ["", *table_lines(table)]
    return lines

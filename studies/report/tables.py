"""Tables of figures over the seeds, from the rows of a study, and as Markdown."""

import math
import statistics
from typing import NamedTuple


class Table(NamedTuple):
    """Cells as text, the first of a row its name."""

    title: str
    head: list
    rows: list


class Report(NamedTuple):
    """What a study shows: {name: Table}, and {name: list of Chart} of each picture."""

    title: str
    introduction: str
    tables: dict
    pictures: dict = {}


class Column(NamedTuple):
    """A column of a table: mean ± standard deviation of the figure `name` in the rows that match
    `query`, or the mean alone."""

    head: str
    name: str
    query: dict = {}
    digits: int = 2
    spread: bool = True

    def cell(self, rows):
        value = over_seeds(rows, self.name, **self.query)
        return plus_minus(value, self.digits) if self.spread else f"{value[0]:.{self.digits}f}"


def matching(rows, **query):
    """The rows, dicts, that hold all of `query`."""
    return [row for row in rows if all(row.get(key) == value for key, value in query.items())]


def mean_and_spread(values):
    """Mean and sample standard deviation, 0 of a single value; nan without any."""
    if not values:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def over_seeds(rows, name, **query):
    """Mean and spread of a figure over the rows that have it and hold all of `query`: one a
    seed."""
    return mean_and_spread([row[name] for row in matching(rows, **query) if name in row])


def tabulate(title, corner, rows, lines, columns):
    """A Table with a row for each of `lines`, {label, or a tuple of labels: query}, that any row of
    the study matches. The labels stand below `corner`, a list."""
    cells = []
    for label, query in lines.items():
        if own := matching(rows, **query):
            labels = (label,) if isinstance(label, str) else label
            cells.append([*labels, *(column.cell(own) for column in columns)])
    return Table(title, [*corner, *(column.head for column in columns)], cells)


def plus_minus(value, digits=2):
    """(mean, spread) -> "0.97 ± 0.02", or "–" where there is no row."""
    return "–" if math.isnan(value[0]) else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def table_lines(table):
    """A table as lines of Markdown, without its title."""
    lines = []
    for cells in (table.head, ["---"] * len(table.head), *table.rows):
        lines.append("|" + "".join(f" {text} |" if text else " |" for text in cells))
    lines[1] = lines[1].replace(" ", "")
    return lines


def markdown(report):
    """Lines of a study's page: title, introduction, tables."""
    lines = [f"# {report.title}", "", report.introduction, ""]
    for table in report.tables.values():
        if table.title:
            lines += [f"## {table.title}", ""]
        lines += [*table_lines(table), ""]
    return lines

"""Tables of figures over the seeds, from the rows of a study, and as Markdown."""

import math
from typing import NamedTuple

from judge import over_seeds


class Table(NamedTuple):
    """Cells as text, the first of a row its name."""

    title: str
    head: list
    rows: list


class Column(NamedTuple):
    """A column of a table: mean ± standard deviation of the figure `name` in the rows that match
    `query`, or the mean alone."""

    head: str
    name: str
    query: dict = {}
    digits: int = 2
    spread: bool = True

    def cell(self, rows, query):
        value = over_seeds(rows, self.name, **query, **self.query)
        return plus_minus(value, self.digits) if self.spread else f"{value[0]:.{self.digits}f}"


def tabulate(title, corner, rows, lines, columns):
    """A Table with a row for each of `lines`, {label, or a tuple of labels: query}, whose labels
    stand below `corner`, a list."""
    cells = []
    for label, query in lines.items():
        labels = (label,) if isinstance(label, str) else label
        cells.append([*labels, *(column.cell(rows, query) for column in columns)])
    return Table(title, [*corner, *(column.head for column in columns)], cells)


def matching(rows, **query):
    """The rows that hold all of `query`."""
    return [row for row in rows if all(row.get(key) == value for key, value in query.items())]


def melted(rows, names):
    """A row for each of `names`, with its figure as "value"."""
    return [row | {"name": name, "value": row[name]} for row in rows for name in names]


def means(rows, column, key, values, **query):
    """[(mean, standard deviation)] of a column where `key` has each of `values`."""
    return [over_seeds(rows, column, **{key: value}, **query) for value in values]


def plus_minus(value, digits=2):
    """(mean, spread) -> "0.97 ± 0.02", or "nan" where there is no row."""
    return "nan" if math.isnan(value[0]) else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def table_lines(table):
    """A table as lines of Markdown, without its title."""
    lines = []
    for cells in (table.head, ["---"] * len(table.head), *table.rows):
        texts = ["–" if cell == "nan" else cell for cell in cells]
        lines.append("|" + "".join(f" {text} |" if text else " |" for text in texts))
    lines[1] = lines[1].replace(" ", "")
    return lines


def markdown(result):
    """Lines of a study's page: title, introduction, tables."""
    lines = [f"# {result['title']}", ""]
    if result["introduction"]:
        lines += [*result["introduction"], ""]
    for table in result["tables"].values():
        if table.title:
            lines += [f"## {table.title}", ""]
        lines += [*table_lines(table), ""]
    return lines

"""Line charts as SVG: a file of its own for docs/, or a figure of the report with values to read off.

The figure's numbers stand in its data-points, which the script of template.html shows: for each series a list of
[column, row, x, value], the first two in the picture's own units, the others as text.
"""

import json
import math
from html import escape
from typing import NamedTuple

import numpy as np


class Chart(NamedTuple):
    """What to draw: series [(name, xs, ys, spreads or None)], a spread shown as a bar of +- that much; labels x, y."""

    title: str
    series: list
    x: str
    y: str
    log: bool = False  # a logarithmic x axis, ticks at the points
    level: float | None = None  # a dashed horizontal line


def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 6)
    return np.arange(np.ceil(low / step - 1e-9), high / step + 1e-9) * step + 0.0  # no -0


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 216, 44, 10, 20, 36
FEW = 12  # points at most that are marked one by one


def drawn(chart):
    """(marks, series) of a chart: SVG elements, and for each series with a point (its place, which is its colour, name,
    points (x, y, spread), their places in the picture)."""
    series = []
    for i, (name, xs, ys, spreads) in enumerate(chart.series):
        points = [
            point for point in zip(xs, ys, spreads or [0.0] * len(xs)) if not math.isnan(point[1])
        ]
        if points:
            series.append((i, name, points))
    if not series:
        return "", []
    every = [point for _, _, points in series for point in points]
    level = [] if chart.level is None else [chart.level]
    low, high = (
        min([y - sd for _, y, sd in every] + level),
        max([y + sd for _, y, sd in every] + level),
    )
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    scale = math.log10 if chart.log else float
    left, right = scale(min(x for x, _, _ in every)), scale(max(x for x, _, _ in every))
    right = right if right > left else left + 1

    def column(x):
        return LEFT + 8 + (scale(x) - left) / (right - left) * (WIDTH - LEFT - RIGHT - 16)

    def line(y):
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    marked = sorted({x for x, _, _ in every}) if chart.log else ticks(left, right)
    marks = axes(
        chart,
        [(column(x), number(x)) for x in marked],
        [(line(y), number(y)) for y in ticks(low, high)],
    )
    marks += "".join(
        f'<path class="level" d="M{LEFT} {line(y):.1f}H{WIDTH - RIGHT}"/>' for y in level
    )
    placed = []
    for i, name, points in series:
        places = [(round(column(x), 1), round(line(y), 1)) for x, y, _ in points]
        edges = [
            (round(column(x), 1), round(line(y - sd), 1), round(line(y + sd), 1))
            for x, y, sd in points
        ]
        if len(points) <= FEW:
            marks += "".join(
                f'<path class="whisker c{i}" d="M{x} {a}V{b}"/>' for x, a, b in edges if a != b
            )
            marks += "".join(
                f'<circle class="dot c{i}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in places
            )
        else:
            around = [f"{x},{a}" for x, a, _ in edges] + [f"{x},{b}" for x, _, b in reversed(edges)]
            marks += f'<polygon class="band c{i}" points="{" ".join(around)}"/>'
        marks += f'<polyline class="line c{i}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
        placed.append((i, name, points, places))
    return marks, placed


def figure(chart):
    """A chart for the page: an SVG whose legend shows values under the pointer; "" without a single point."""
    marks, series = drawn(chart)
    if not series:
        return ""
    marks += f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    legend, data, said = "", [], []
    for i, name, points, places in series:
        values = [number(y, 3) + (f" ± {number(sd, 2)}" if sd else "") for _, y, sd in points]
        data.append(
            [[*place, number(x), value] for place, (x, _, _), value in zip(places, points, values)]
        )
        swatch = f'<svg viewBox="0 0 22 8" aria-hidden="true"><path class="line c{i}" d="M0 4H22"/></svg>'
        legend += f"<li>{swatch}{escape(name)} <b>{values[-1]}</b></li>"
        said.append(f"{name} goes from {values[0]} to {values[-1]}")
    marks += "".join(f'<circle class="hover c{i}" r="4"/>' for i, *_ in series)
    label = escape(f"{chart.title}: {chart.y} by {chart.x}. {'; '.join(said)}.")
    return (
        f'<figure data-points="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><span>{escape(chart.title)}</span>"
        f'<small>{escape(chart.x)} <b class="at">{data[0][-1][2]}</b></small></figcaption>'
        f'<ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}">{marks}</svg></figure>'
    )


# Okabe and Ito's colours, which most people can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = (
    "text{font:10px sans-serif;fill:#333}"
    ".title{font-weight:bold;font-size:12px}.line,.whisker{fill:none;stroke-width:2}"
    ".whisker{stroke-width:1}.grid{stroke:#e1e1e1}.axis{stroke:#333}.level{stroke:#333;stroke-dasharray:4 3}"
    ".band{opacity:.2}"
) + "".join(
    f".line.c{i},.whisker.c{i}{{stroke:{c}}}.dot.c{i},.band.c{i},.name.c{i}{{fill:{c}}}"
    for i, c in enumerate(COLOURS)
)
HEAD, ACROSS = 36, 3  # room for a chart's title and names; charts side by side


def picture(charts):
    """Charts as one SVG file that needs nothing else, ACROSS of them side by side."""
    rows = -(-len(charts) // ACROSS)
    width, height = min(len(charts), ACROSS) * WIDTH, rows * (HEIGHT + HEAD)
    body = ""
    for n, chart in enumerate(charts):
        marks, series = drawn(chart)
        names, x = "", LEFT
        for i, name, *_ in series:
            names += f'<text class="name c{i}" x="{x}" y="30">{escape(name)}</text>'
            x += 6 * len(name) + 14
        title = f'<text class="title" x="{LEFT}" y="15">{escape(chart.title)}</text>'
        place = f"translate({n % ACROSS * WIDTH} {n // ACROSS * (HEIGHT + HEAD)})"
        body += f'<g transform="{place}">{title}{names}<g transform="translate(0 {HEAD})">{marks}</g></g>\n'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>\n{body}</svg>\n'
    )


def number(value, digits=4):
    return f"{value:z.{digits}g}".replace("-", "−")


def axes(chart, columns, rows):
    """The grid and what is written at it: columns and rows are lists of (place, text)."""
    bottom = HEIGHT - BOTTOM
    marks = f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
    for y, text in rows:
        marks += f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        marks += f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
    for x, text in columns:
        marks += f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks += f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.x)}</text>'
    return marks + f'<text x="{LEFT}" y="8">{escape(chart.y)}</text>'

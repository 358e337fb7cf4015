"""Line charts as SVG that needs nothing else, one file for the panels of a picture."""

import math
from html import escape
from typing import NamedTuple

import numpy as np

from studies.report.tables import matching, over_seeds


class Series(NamedTuple):
    """A line: x of each point, and (mean, spread), drawn as a bar of ± the spread."""

    name: str
    xs: list
    points: list


class Chart(NamedTuple):
    """A panel. axis: of x, "linear", "log" with ticks at the points, or "root" for points near
    0."""

    title: str
    series: list
    x: str
    y: str
    axis: str = "linear"
    level: float | None = None  # a dashed horizontal line


def curve(name, rows, key, y, x=None, **query):
    """A Series over the rows that hold all of `query`, with a point for each value of `key`: the
    figure y over the seeds, at that value or at the mean of the figure x."""
    own = matching(rows, **query)
    values = sorted({row[key] for row in own})
    points = [over_seeds(own, y, **{key: value}) for value in values]
    if x:
        values = [over_seeds(own, x, **{key: value})[0] for value in values]
    return Series(name, values, points)


WIDTH, HEIGHT = 360, 320
LEFT, RIGHT, BOTTOM = 62, 12, 46
LINE = 17  # height of a line of text
MOST_DOTS = 20  # points of a line with a dot each
SCALES = {"linear": float, "log": math.log10, "root": lambda x: math.sqrt(max(0.0, x))}
# Okabe and Ito's colours, which most people can tell apart, and dashes for those who cannot
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07800", "#3a9ad0", "#000000")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "12 3", "1 2")
STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-weight:bold;font-size:14px}"
    "path,polyline{fill:none;stroke-width:2}.grid{stroke:#e1e1e1;stroke-width:1}"
    ".axis{stroke:#333;stroke-width:1}.level{stroke:#333;stroke-width:1;stroke-dasharray:4 3}"
)


def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 6)
    return np.arange(np.ceil(low / step - 1e-9), high / step + 1e-9) * step + 0.0  # no -0


def x_ticks(chart, xs):
    if chart.axis == "log":
        return sorted(set(xs))
    if chart.axis == "root":  # even steps of the root
        return [float(f"{max(xs) * share:.2g}") for share in (0, 1 / 16, 1 / 4, 9 / 16, 1)]
    return ticks(min(xs), max(xs))


def y_range(charts):
    """The range that holds all points of charts with one y axis, with their spreads and levels."""
    values = [chart.level for chart in charts if chart.level is not None]
    for chart in charts:
        for series in chart.series:
            for y, spread in series.points:
                values += [y - spread, y + spread]
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def number(value):
    return f"{value:z.4g}".replace("-", "−")


def text(x, y, content, anchor="start", kind="", turn=""):
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    attributes += f' class="{kind}"' if kind else ""
    attributes += f' transform="{turn}"' if turn else ""
    return f"<text {attributes}>{escape(content)}</text>"


def panel(chart, low, high, top):
    """SVG elements of a chart whose y axis goes from low to high, below a legend of height top."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    scale = SCALES[chart.axis]
    xs = [x for series in chart.series for x in series.xs]
    first, last = scale(min(xs)), scale(max(xs))

    def column(x):
        return LEFT + 10 + (scale(x) - first) / ((last - first) or 1) * (right - LEFT - 20)

    def row(y):
        return bottom - (y - low) / (high - low) * (bottom - top)

    marks = [text(8, 16, chart.title, kind="title")]
    for y in ticks(low, high):
        marks.append(f'<path class="grid" d="M{LEFT} {row(y):.1f}H{right}"/>')
        marks.append(text(LEFT - 6, row(y) + 4, number(y), "end"))
    marks.append(f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>')
    for x in x_ticks(chart, xs):
        marks.append(f'<path class="axis" d="M{column(x):.1f} {bottom}v4"/>')
        marks.append(text(column(x), bottom + 18, number(x), "middle"))
    marks.append(text((LEFT + right) / 2, HEIGHT - 8, chart.x, "middle"))
    middle = (top + bottom) / 2
    marks.append(text(16, middle, chart.y, "middle", turn=f"rotate(-90 16 {middle:.1f})"))
    if chart.level is not None:
        marks.append(f'<path class="level" d="M{LEFT} {row(chart.level):.1f}H{right}"/>')
    for i, series in enumerate(chart.series):
        colour = f'stroke="{COLOURS[i]}"'
        dashed = f'{colour} stroke-dasharray="{DASHES[i]}"'
        places = [(column(x), row(y)) for x, (y, _) in zip(series.xs, series.points)]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks.append(f'<polyline class="line" {dashed} points="{corners}"/>')
        for x, (y, spread) in zip(series.xs, series.points):
            if spread:
                bar = f"M{column(x):.1f} {row(y - spread):.1f}V{row(y + spread):.1f}"
                marks.append(f'<path class="spread" {colour} d="{bar}"/>')
        for x, y in places if len(places) <= MOST_DOTS else []:
            dot = f'cx="{x:.1f}" cy="{y:.1f}" r="3"'
            marks.append(f'<circle class="dot" {dot} fill="{COLOURS[i]}"/>')
        y = 30 + LINE * i
        marks.append(f'<path class="mark" {dashed} d="M{LEFT} {y}h26"/>')
        marks.append(text(LEFT + 34, y + 4, series.name))
    return "\n".join(marks)


def picture(charts):
    """Charts as one SVG, two or three side by side. Those with the same y label share its range."""
    across = 3 if len(charts) % 3 == 0 else min(2, len(charts))
    height = HEIGHT * (len(charts) // across)
    legend = LINE * max(len(chart.series) for chart in charts)
    panels = []
    for i, chart in enumerate(charts):
        low, high = y_range([other for other in charts if other.y == chart.y])
        place = f"translate({i % across * WIDTH} {i // across * HEIGHT})"
        panels.append(f'<g transform="{place}">\n{panel(chart, low, high, 30 + legend)}\n</g>')
    size = f'viewBox="0 0 {across * WIDTH} {height}" width="{across * WIDTH}"'
    ground = f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    body = "\n".join([ground, *panels])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'

"""Line charts as SVG for the report: what plot.py draws as PNG, in the reader's colours and with values to read off.

The numbers stand in the figure's data-points and the script of report_template.html shows them: for each series a list
of [column, row, x, value], the first two in the picture's own units, the others as text.
"""

import json
import math
from html import escape

from plot import ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 216, 44, 10, 20, 36
FEW = 12  # points at most that are marked one by one


def svg(chart):
    """A plot.Chart as a figure whose legend shows values; "" without a single point."""
    series = []  # (place among all series, which is its colour, name, points)
    for i, (name, xs, ys, spreads) in enumerate(chart.series):
        points = [point for point in zip(xs, ys, spreads or [0.0] * len(xs)) if not math.isnan(point[1])]
        if points:
            series.append((i, name, points))
    if not series:
        return ""
    every = [point for _, _, points in series for point in points]
    level = [] if chart.level is None else [chart.level]
    low, high = min([y - sd for _, y, sd in every] + level), max([y + sd for _, y, sd in every] + level)
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
    marks = axes(chart, [(column(x), number(x)) for x in marked], [(line(y), number(y)) for y in ticks(low, high)])
    marks += "".join(f'<path class="level" d="M{LEFT} {line(y):.1f}H{WIDTH - RIGHT}"/>' for y in level)
    marks += f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
    legend, data, said = "", [], []
    for i, name, points in series:
        places = [(round(column(x), 1), round(line(y), 1)) for x, y, _ in points]
        edges = [(round(column(x), 1), round(line(y - sd), 1), round(line(y + sd), 1)) for x, y, sd in points]
        if len(points) <= FEW:
            marks += "".join(f'<path class="whisker c{i}" d="M{x} {a}V{b}"/>' for x, a, b in edges if a != b)
            marks += "".join(f'<circle class="dot c{i}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in places)
        else:
            around = [f"{x},{a}" for x, a, _ in edges] + [f"{x},{b}" for x, _, b in reversed(edges)]
            marks += f'<polygon class="band c{i}" points="{" ".join(around)}"/>'
        marks += f'<polyline class="line c{i}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'
        values = [number(y, 3) + (f" ± {number(sd, 2)}" if sd else "") for _, y, sd in points]
        data.append([[*place, number(x), value] for place, (x, _, _), value in zip(places, points, values)])
        swatch = f'<svg viewBox="0 0 22 8" aria-hidden="true"><path class="line c{i}" d="M0 4H22"/></svg>'
        legend += f"<li>{swatch}{escape(name)} <b>{values[-1]}</b></li>"
        said.append(f"{name} goes from {values[0]} to {values[-1]}")
    marks += "".join(f'<circle class="hover c{i}" r="4"/>' for i, _, _ in series)
    label = escape(f"{chart.title}: {chart.y} by {chart.x}. {'; '.join(said)}.")
    return (
        f'<figure data-points="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"<figcaption><span>{escape(chart.title)}</span>"
        f'<small>{escape(chart.x)} <b class="at">{data[0][-1][2]}</b></small></figcaption>'
        f'<ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}">{marks}</svg></figure>'
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

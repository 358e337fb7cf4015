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
    series = []
    for name, xs, ys, spreads in chart.series:
        spreads = [None] * len(xs) if spreads is None else spreads
        series.append((name, [point for point in zip(xs, ys, spreads) if point[1] == point[1]]))
    series = [(name, points) for name, points in series if points]
    if not series:
        return ""
    every = [point for _, points in series for point in points]
    lows, highs = ([y + sign * (sd or 0) for _, y, sd in every] for sign in (-1, 1))
    level = [] if chart.level is None else [chart.level]
    low, high = min(lows + level), max(highs + level)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    scale = math.log10 if chart.log else float
    left, right = scale(min(x for x, _, _ in every)), scale(max(x for x, _, _ in every))
    right = right if right > left else left + 1

    def column(x):
        return LEFT + 8 + (scale(x) - left) / (right - left) * (WIDTH - LEFT - RIGHT - 16)

    def line(y):
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    marks = []
    for y in ticks(low, high):
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{line(y):.1f}" y2="{line(y):.1f}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{line(y) + 3.5:.1f}" text-anchor="end">{y:.4g}</text>')
    bottom = HEIGHT - BOTTOM
    for x in sorted({x for x, _, _ in every}) if chart.log else ticks(left, right):
        marks.append(f'<text x="{column(x):.1f}" y="{bottom + 15}" text-anchor="middle">{x:.4g}</text>')
    marks.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for y in level:
        marks.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{line(y):.1f}" y2="{line(y):.1f}"/>')
    marks.append(f'<text x="{LEFT}" y="8">{escape(chart.y)}</text>')
    marks.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{bottom}"/>')
    marks.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.x)}</text>'
    )
    legend, data, said, hover = "", [], [], ""
    for i, (name, points) in enumerate(series):
        path = [f"{column(x):.1f},{line(y):.1f}" for x, y, _ in points]
        few = len(points) <= FEW
        if points[0][2] is not None and not few:
            edge = [f"{column(x):.1f},{line(y + sd):.1f}" for x, y, sd in points]
            edge += [f"{column(x):.1f},{line(y - sd):.1f}" for x, y, sd in reversed(points)]
            marks.append(f'<polygon class="band c{i}" points="{" ".join(edge)}"/>')
        for x, y, sd in points if few else ():
            if sd:
                marks.append(f'<path class="whisker c{i}" d="M{column(x):.1f} {line(y - sd):.1f}V{line(y + sd):.1f}"/>')
            marks.append(f'<circle class="dot c{i}" cx="{column(x):.1f}" cy="{line(y):.1f}" r="2.6"/>')
        marks.append(f'<polyline class="line c{i}" points="{" ".join(path)}"/>')
        hover += f'<circle class="hover c{i}" r="4"/>'
        values = [f"{y:.3g}" + (f" ± {sd:.2g}" if sd else "") for _, y, sd in points]
        data.append([[round(column(x), 1), round(line(y), 1), f"{x:.4g}", v] for (x, y, _), v in zip(points, values)])
        swatch = f'<svg viewBox="0 0 22 8" aria-hidden="true"><path class="line c{i}" d="M0 4H22"/></svg>'
        legend += f"<li>{swatch}{escape(name)} <b>{values[-1]}</b></li>"
        said.append(f"{name} goes from {values[0]} to {values[-1]}")
    last = f"{series[0][1][-1][0]:.4g}"
    label = escape(f"{chart.title}: {chart.y} by {chart.x}. {'; '.join(said)}.", quote=True)
    points = escape(json.dumps(data, separators=(",", ":")), quote=True)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}">'
    return (
        f'<figure data-points="{points}"><figcaption>{escape(chart.title)}<small>{escape(chart.x)} '
        f'<b class="at">{last}</b></small></figcaption><ul class="legend">{legend}</ul>'
        f"{picture}{''.join(marks)}{hover}</svg></figure>"
    )

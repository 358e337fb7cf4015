"""Line charts as PNG, with numpy alone: what evaluate.py draws for the README.

save("curve.png", [Chart("TITLE", [("name", xs, ys, spreads)], x="steps", y="accuracy")])
"""

from typing import NamedTuple

import imageio.v3 as imageio
import numpy as np

# Letters of 3 x 5 dots: a digit a row, whose bits are the dots
FONT = {
    **dict(zip("ABCDEFGHI", ("25755", "65656", "34443", "65556", "74647", "74644", "34553", "55755", "72227"))),
    **dict(zip("JKLMNOPQR", ("11152", "55655", "44447", "57755", "65555", "25552", "65644", "25563", "65655"))),
    **dict(zip("STUVWXYZ ", ("34216", "72222", "55557", "55552", "55775", "55255", "55222", "71247", "00000"))),
    **dict(zip("012345678", ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71222", "75757"))),
    **dict(zip("9.-+/():=", ("75717", "00002", "00700", "02720", "11244", "12221", "42224", "02020", "07070"))),
    **dict(zip("%^,|<>*", ("51245", "25000", "00024", "22222", "12421", "42124", "52725"))),
}
# Okabe and Ito's colours, which most people can tell apart
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (0, 0, 0))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 340, 62, 14, 34, 46
INK, GRID = (40, 40, 40), (225, 225, 225)


class Chart(NamedTuple):
    """What to draw: series [(name, xs, ys, spreads or None)], a spread shown as a bar of +- that much; labels x, y."""

    title: str
    series: list
    x: str
    y: str
    log: bool = False  # a logarithmic x axis, ticks at the points
    level: float | None = None  # a dashed horizontal line


def write(picture, text, row, column, colour=INK, turned=False):
    """Writes text, letters without case, into picture (H, W, 3) from its top left dot on, two pixels a dot."""
    dots = np.zeros((5, 4 * len(text)), bool)
    for i, letter in enumerate(text.upper()):
        for j, digit in enumerate(FONT.get(letter, FONT["-"])):
            dots[j, 4 * i : 4 * i + 3] = [int(digit) >> bit & 1 for bit in (2, 1, 0)]
    dots = dots.repeat(2, 0).repeat(2, 1)
    dots = np.rot90(dots) if turned else dots
    place = picture[row : row + dots.shape[0], column : column + dots.shape[1]]
    place[dots[: place.shape[0], : place.shape[1]]] = colour


def line(picture, rows, columns, colour, thick=2):
    """Draws the polyline through the points."""
    for r0, c0, r1, c1 in zip(rows, columns, rows[1:], columns[1:]):
        n = int(max(abs(r1 - r0), abs(c1 - c0))) * 2 + 2
        r, c = np.linspace(r0, r1, n).round().astype(int), np.linspace(c0, c1, n).round().astype(int)
        for i in range(thick):
            for j in range(thick):
                picture[(r + i).clip(0, HEIGHT - 1), (c + j).clip(0, WIDTH - 1)] = colour


def ticks(low, high):
    """About five round numbers from low to high."""
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= 6)
    return np.arange(np.ceil(low / step - 1e-9), high / step + 1e-9) * step + 0.0  # no -0


def draw(chart):
    """A Chart as a picture (H, W, 3) uint8."""
    title, series, x, y, log, level = chart
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    every_x = np.concatenate([np.asarray(xs, float) for _, xs, _, _ in series])
    lows = [np.asarray(ys, float) - (0 if sd is None else np.asarray(sd)) for _, _, ys, sd in series]
    highs = [np.asarray(ys, float) + (0 if sd is None else np.asarray(sd)) for _, _, ys, sd in series]
    extra = [] if level is None else [level]
    low, high = min(np.concatenate(lows).min(), *extra, np.inf), max(np.concatenate(highs).max(), *extra, -np.inf)
    pad = 0.06 * (high - low) or 0.5
    low, high = low - pad, high + pad
    scale = np.log10 if log else np.asarray
    left, right = scale(every_x.min()), scale(every_x.max())
    right = right if right > left else left + 1

    def column(value):
        return LEFT + (scale(np.asarray(value, float)) - left) / (right - left) * (WIDTH - LEFT - RIGHT - 12) + 6

    def row(value):
        return HEIGHT - BOTTOM - (np.asarray(value, float) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    for value in ticks(low, high):
        line(picture, [row(value)] * 2, [LEFT, WIDTH - RIGHT], GRID, 1)
        text = f"{value:.4g}"
        write(picture, text, int(row(value)) - 5, LEFT - 8 * len(text) - 4)
    for value in np.unique(every_x) if log else ticks(every_x.min(), max(every_x.max(), every_x.min() + 1e-9)):
        text = f"{value:.4g}"
        line(picture, [HEIGHT - BOTTOM, HEIGHT - BOTTOM + 4], [column(value)] * 2, INK, 1)
        write(picture, text, HEIGHT - BOTTOM + 8, int(column(value)) - 4 * len(text))
    line(picture, [HEIGHT - BOTTOM] * 2, [LEFT, WIDTH - RIGHT], INK, 1)
    for start in range(LEFT, WIDTH - RIGHT, 12) if level is not None else ():
        line(picture, [row(level)] * 2, [start, start + 6], INK, 1)
    for (_, xs, ys, spread), colour in zip(series, COLOURS):
        line(picture, row(ys), column(xs), colour)
        for i, (r, c) in enumerate(zip(row(ys), column(xs))):
            if spread is not None:
                line(picture, [row(ys[i] - spread[i]), row(ys[i] + spread[i])], [c, c], colour, 1)
                picture[int(r) - 2 : int(r) + 4, int(c) - 2 : int(c) + 4] = colour
    start = LEFT + 8
    for (name, *_), colour in zip(series, COLOURS):
        write(picture, name, 18, start, colour)
        start += 8 * len(name) + 12
    write(picture, title, 3, LEFT + 8)
    write(picture, x, HEIGHT - 16, LEFT + (WIDTH - LEFT - RIGHT) // 2 - 4 * len(x))
    write(picture, y, HEIGHT // 2 - 4 * len(y), 4, turned=True)
    return picture


def save(path, charts):
    """Writes the charts as one PNG, three a row, four in two."""
    across, tiles = 2 if len(charts) == 4 else 3, [draw(chart) for chart in charts]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % across if len(tiles) > across else 0)
    imageio.imwrite(path, np.vstack([np.hstack(tiles[i : i + across]) for i in range(0, len(tiles), across)]))

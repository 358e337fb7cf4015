"""Pictures of clips: animations and contact sheets, with labels and captions."""

import textwrap

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with imageio

from real_data.video import to_pixels

GREY = 96  # between clips and behind text
FONT, LINE = ImageFont.load_default(14), 18  # LINE: height of a line in pixels


def _text(text, height, width):
    """A text on grey, wrapped and cut to fit: uint8 (height, width, 3)."""
    picture = Image.new("RGB", (width, height), (GREY,) * 3)
    lines = textwrap.wrap(text, max(1, width // 7))[: height // LINE]
    ImageDraw.Draw(picture).multiline_text((0, 0), "\n".join(lines), "white", FONT)
    return np.asarray(picture)


def _tile(rows, labels=(), gap=2):
    """Rows of pictures (H, W, 3), each behind its label, as one picture with grey lines between."""
    pad = ((gap, gap), (gap, gap), (0, 0))
    if labels:
        width = 4 + max(round(FONT.getlength(label)) for label in labels)
        rows = [[_text(label, row[0].shape[0], width), *row] for label, row in zip(labels, rows)]
    tiled = [[np.pad(picture, pad, constant_values=GREY) for picture in row] for row in rows]
    return np.concatenate([np.concatenate(row, 1) for row in tiled], 0)


def write_gif(path, rows, zoom=4, fps=8, labels=(), captions=()):
    """An animation of `rows`, a list of video batches (n, C, T, H, W): one row of clips each.

    labels: a text for each row, to its left; captions: a text for each column, above it."""
    rows = [to_pixels(row, zoom) for row in rows]
    heading = [[_text(text, 3 * LINE, rows[0].shape[-2]) for text in captions]] if captions else []
    labels = ["", *labels] if labels and captions else labels
    frames = []
    for i in range(rows[0].shape[1]):
        frames.append(_tile([*heading, *([clip[i] for clip in row] for row in rows)], labels))
    iio.imwrite(path, np.stack(frames), duration=1000 / fps, loop=0)


def write_sheet(path, videos, zoom=3, labels=(), captions=()):
    """A contact sheet of videos (n, C, T, H, W): a row a clip, its frames from left to right.

    labels: a text for each clip, to its left; captions: one for each, above it, "" for none."""
    rows, row_labels = [], []
    for i, clip in enumerate(to_pixels(videos, zoom)):
        if captions and captions[i]:
            rows.append([_text(captions[i], LINE, len(clip) * (clip.shape[2] + 4) - 4)])
            row_labels.append("")
        rows.append(list(clip))
        row_labels.append(labels[i] if labels else "")
    iio.imwrite(path, _tile(rows, row_labels if labels else ()))

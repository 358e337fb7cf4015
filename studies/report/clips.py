"""Rows of clips for the report: the same prompts and noise, another model or other weights in each.

A row holds its own pictures. Where the checkpoint of a row is missing, the row of an earlier page
is taken over as it is."""

import io
import re
from base64 import b64encode
from html import escape
from itertools import product

import imageio.v3 as imageio
import torch

import world
from data import DIMENSIONS
from judge import NOISE_SEED, sample_prompts
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from real_data.video import to_pixels
from runtime.checkpoint import WEIGHTS
from runtime.cli import progress_bar
from sample import NRG_EPS, NRG_INTERVAL, NRG_SCALE
from studies import align, online
from studies.policies import NAMES

# The first eight have every colour, shape and direction; the base model has not seen the eighth
PROMPTS = world.split_prompts(*world.SPLIT_NAMES)[(11 * torch.arange(24) + 7) % 96]
COLUMNS, SLIDER_COLUMNS = 8, 6  # of these are shown; means are over all
STEPS = (-4, 0, 4)  # weights of the sliders
EQUAL = (1, 1, 1)


def policies(settings):
    """{row: (title, note, checkpoint)} of the policies that the studies trained with seed 0."""
    rows = {"base": (NAMES["base"], "no feedback", WEIGHTS / "base.pt")}
    for method in ("sft", "rwr", "dpo-schedule", "dpo-constant"):
        name = align.checkpoint_name(method, "1:1:1", 0)
        path = settings.folder("align") / name / "last.pt"
        rows[method] = NAMES[method], "aligned 1:1:1", path
    for arm, title in {"dpo-refreshed": "Flow-DPO online", "nft-refreshed": "DiffusionNFT"}.items():
        path = settings.folder("online") / f"{arm}-0" / f"round-{online.SAVED}.pt"
        rows[arm] = title, f"{online.SAVED} rounds, VideoReward refreshed", path
    return rows


def bars(scores):
    """Three true scores, each a number and a bar."""
    parts = []
    for name, score in zip(DIMENSIONS, scores.tolist()):
        width = min(1.0, max(0.0, score))
        number = f"{score:z.2f}".replace("-", "−")
        label = f'<span class="hidden">{name} </span>{number}'
        parts.append(f'<span class="{name.lower()}" style="--v: {width:.2f}">{label}</span>')
    return f'<div class="score">{"".join(parts)}</div>'


def png(video):
    """A clip (3, T, H, W) as the text of a data URL: its frames side by side, 6 bits a channel,
    which is half the size and looks the same."""
    pixels = to_pixels(video) >> 2  # (T, H, W, 3)
    pixels = (pixels << 2 | pixels >> 4).transpose(1, 0, 2, 3)  # (H, T, W, 3)
    height, frames, width, _ = pixels.shape
    file = io.BytesIO()
    imageio.imwrite(
        file, pixels.reshape(height, frames * width, 3), extension=".png", optimize=True
    )
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def row_html(name, title, note, videos, scores, columns=COLUMNS, hidden=False):
    """A table row: mean scores (N, 3) of all clips, then the first clips with their own."""
    cells = []
    for video, score, prompt in zip(videos[:columns], scores, PROMPTS):
        label = escape(f"{title}: {world.prompt_text(prompt)}")
        style = f"background-image: url({png(video)})"
        clip = f'<div class="clip" role="img" aria-label="{label}" style="{style}"></div>'
        cells.append(f"<td>{clip}{bars(score)}</td>")
    head = f"{escape(title)}<small>{escape(note)}</small><small>mean of {len(scores)}</small>"
    head = f'<th scope="row">{head}{bars(scores.mean(0))}</th>'
    return f'<tr id="{name}"{" hidden" if hidden else ""}>{head}{"".join(cells)}</tr>'


def sampled(model, words, device):
    """Videos (N, 3, T, H, W) and true scores (N, 3) for PROMPTS."""
    videos = sample_prompts(model, words, PROMPTS, NOISE_SEED, device)
    return videos, world.oracle(videos, PROMPTS)


def earlier_row(page, name):
    match = re.search(rf'<tr id="{name}".*?</tr>', page, re.DOTALL)
    return match[0] if match else ""


def gallery(settings, page):
    """(rows of all policies and of Flow-NRG as HTML, lines that say where they are from). page: the
    text of an earlier report, or ""."""
    rows, lines = [], []
    for name, (title, note, path) in policies(settings).items():
        if path.exists():
            model, words = load_velocity(path)
            clips = sampled(model.to(settings.device), words, settings.device)
            rows.append(row_html(name, title, note, *clips))
            lines.append(f"clips of {title}: sampled from {path}")
        elif row := earlier_row(page, name):
            rows.append(row)
            lines.append(f"clips of {title}: as on the page before, since {path} is missing")
        else:
            lines.append(f"clips of {title}: none, since {path} is missing")
    return rows, lines


def steered_rows(settings):
    """(the row of Flow-NRG 1:1:1, a row for each setting of the sliders)."""
    base, words = load_velocity(WEIGHTS / "base.pt")
    reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt")
    base, reward = base.to(settings.device), reward.to(settings.device)
    rows = []
    choices = [EQUAL, *product(STEPS, repeat=3)]
    for weights in progress_bar("sampling with guidance", "weights")(choices):
        model = SteeredPolicy(base, reward, weights, NRG_SCALE, NRG_EPS, NRG_INTERVAL)
        clips = sampled(model, words, settings.device)
        title = "Flow-NRG " + ":".join(map(str, weights)).replace("-", "−")
        note = "base model, steered"
        if weights == EQUAL:
            equal = row_html("nrg-1-1-1", title, note, *clips)
            continue
        name = "w" + ",".join(map(str, weights))
        hidden = weights != choices[-1]
        rows.append(row_html(name, title, note, *clips, SLIDER_COLUMNS, hidden))
    return equal, rows

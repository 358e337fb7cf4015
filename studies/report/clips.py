"""Clips for the report: a gallery of methods on the same noise, and sliders that choose among steered clips.

Every clip is a row of a sprite sheet, its frames from left to right, that CSS plays; below it stand its true scores.
"""

import itertools
import json
import math
from base64 import b64encode
from html import escape

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

MEANING = dict(zip(DIMENSIONS, ("visual quality", "motion quality", "text alignment")))
# The first eight have every colour, shape and direction; the seventh is of the validation split, the eighth held out
PROMPTS = world.split_prompts(*world.SPLIT_NAMES)[(11 * torch.arange(24) + 7) % 96]
GALLERY_COLUMNS, SLIDER_COLUMNS = 8, 6  # of these are shown, averages are over all
STEERED = "base model, steered"
BASE = ("Base model", "no feedback", WEIGHTS / "base.pt")
REFRESHED = ("Flow-DPO", "dpo-refreshed"), ("DiffusionNFT", "nft-refreshed")
MAKERS = {  # what the clips of a row come from: its words, and a checkpoint that a study made or a shipped file
    "align": [
        BASE,
        ("SFT", "trained on winners", "align/sft-111-0/last.pt"),
        ("Flow-RWR", "all clips, weighted by reward", "align/rwr-111-0/last.pt"),
        ("Flow-DPO", "winner against loser", "align/dpo-constant-111-0/last.pt"),
        ("Flow-NRG 1:1:1", STEERED, WEIGHTS / "base.pt"),
    ],
    "online": [
        BASE,
        *(
            (f"{name}, round {n}", "VideoReward refreshed", f"online/{arm}-0/round-{n}.pt")
            for name, arm in REFRESHED
            for n in (2, 5, 10)
        ),
    ],
}
VALUES = (-4, 0, 4)  # of each slider


def two_digits(value):
    """A number as the page shows it."""
    return "–" if math.isnan(value) else f"{value:z.2f}".replace("-", "−")


def sheet(name, videos):
    """The CSS that shows clips (N, 3, T, H, W) as class `name`: a PNG, a row a clip, its frames from left to right.

    6 bits a channel: little more than half the size, and the eye sees no difference."""
    pixels = to_pixels(videos) >> 2  # (N, T, H, W, 3)
    pixels = (pixels << 2 | pixels >> 4).transpose(0, 2, 1, 3, 4)  # (N, H, T, W, 3)
    count, height, frames, width, _ = pixels.shape
    png = imageio.imwrite(
        "<bytes>",
        pixels.reshape(count * height, frames * width, 3),
        extension=".png",
        optimize=True,
    )
    return f".{name} {{ --rows: {count}; background-image: url(data:image/png;base64,{b64encode(png).decode()}) }}\n"


def bars(scores):
    """Three true scores, each a number and a bar."""
    text = ""
    for n, v in zip(DIMENSIONS, scores):
        text += f'<span class="{n.lower()}" style="--v: {min(1, max(0, v)):.2f}">'
        text += f'<span class="hidden">{n} </span>{two_digits(v)}</span>'
    return f'<div class="score">{text}</div>'


def average(scores):
    """Mean true scores, for the head of a row: (N, 3)."""
    return f"<small>mean of {len(scores)}</small>{bars(scores.mean(0).tolist())}"


def clip(name, row, label, scores):
    """A clip of a sheet with its true scores (3,) under it."""
    picture = f'<div class="clip {name}" style="--row: {row}" role="img" aria-label="{escape(label)}"></div>'
    return f"<td>{picture}{bars(scores)}</td>"


def clip_table(label, prompts, rows):
    """A table of clips, a column a prompt; rows: [(attributes of the row, its head, cells)]."""
    heads = "".join(f'<th scope="col">{world.prompt_text(prompt)}</th>' for prompt in prompts)
    body = "".join(
        f'<tr{kind}><th scope="row">{head}</th>{cells}</tr>' for kind, head, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="clips" style="--n: {len(prompts)}">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def steered(weights, model, reward):
    return SteeredPolicy(model, reward, weights, NRG_SCALE, NRG_EPS, NRG_INTERVAL)


def gallery(study, args, device):
    """(table, CSS): a row for each of a study's MAKERS, all on the same noise."""
    videos, rows = [], []
    prompts = PROMPTS[:GALLERY_COLUMNS]
    for title, said, source in MAKERS[study]:
        path, head = args.work / source, f"{title}<small>{said}</small>"
        if not path.exists():
            text = f"Not trained yet: <code>python evaluate.py {study}</code> does."
            rows.append(("", head, f'<td colspan="{len(prompts)}" class="soft">{text}</td>'))
            continue
        model, words = load_velocity(path)
        model = model.to(device)
        if said == STEERED:
            reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt")
            model = steered((1, 1, 1), model, reward.to(device))
        video = sample_prompts(model, words, PROMPTS, NOISE_SEED, device)
        scores, cells = world.oracle(video, PROMPTS), ""
        for i, prompt in enumerate(prompts):
            label = f"{title}: {world.prompt_text(prompt)}"
            cells += clip(
                f"shown-{study}", len(videos) * len(prompts) + i, label, scores[i].tolist()
            )
        videos.append(video[: len(prompts)])
        rows.append(("", head + average(scores), cells))
    return clip_table(f"Clips of {study}, a column a prompt", prompts, rows), sheet(
        f"shown-{study}", torch.cat(videos)
    )


def sliders(device):
    """Parts of the page: three sliders, the clips that they choose among, sampled here, and their true scores."""
    base, words = load_velocity(WEIGHTS / "base.pt")
    reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt")
    base, reward = base.to(device), reward.to(device)
    prompts, every = PROMPTS[:SLIDER_COLUMNS], list(itertools.product(VALUES, repeat=3))
    videos, scores = [], []
    for weights in progress_bar("sampling for the sliders", "weights")(every):
        model = steered(weights, base, reward)
        video = sample_prompts(model, words, PROMPTS, NOISE_SEED, device)
        videos.append(video[: len(prompts)])
        scores.append(world.oracle(video, PROMPTS))
    rows, names, plain = (
        [],
        [world.prompt_text(prompt) for prompt in prompts],
        every.index((0, 0, 0)),
    )
    for kind, head, at in (
        ("", "Without guidance", plain),
        (' id="guided"', "With these weights", len(every) - 1),
    ):
        clips = (
            clip(f"p{i}", at, f"{head}: {name}", scores[at][i].tolist())
            for i, name in enumerate(names)
        )
        rows.append((kind, head + average(scores[at]), "".join(clips)))
    marks = "".join(f"<span>{value}</span>".replace("-", "−") for value in VALUES)
    controls = "".join(
        f'<div class="{n.lower()}"><label for="w{n}"><span>{n} <small>{MEANING[n]}</small></span> '
        f'<b aria-hidden="true">{VALUES[-1]}</b></label><input id="w{n}" type="range" max="{len(VALUES) - 1}" '
        f'value="{len(VALUES) - 1}" aria-valuetext="{VALUES[-1]}">'
        f'<div class="marks" aria-hidden="true">{marks}</div></div>'
        for n in DIMENSIONS
    )
    shown = [
        [[round(v, 3) for v in clip] for clip in table[: len(prompts)].tolist()] for table in scores
    ]
    means = [[round(v, 3) for v in table.mean(0).tolist()] for table in scores]
    return {
        "sliders": controls,
        "grid": clip_table(
            "Clips without guidance and with the weights chosen above", prompts, rows
        ),
        "data": json.dumps({"values": VALUES, "plain": plain, "shown": shown, "means": means}),
        "sheets": "".join(
            sheet(f"p{i}", torch.stack([v[i] for v in videos])) for i in range(len(prompts))
        ),
    }

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
from common import WEIGHTS, progress_bar
from compare import sample_prompts
from evaluate_align import NOISE_SEED
from model import load_velocity
from nrg import load_noisy_reward, steer
from reward import DIMENSIONS
from sample import NRG_EPS, NRG_INTERVAL, NRG_SCALE, to_pixels

MEANING = dict(zip(DIMENSIONS, ("visual quality", "motion quality", "text alignment")))
# Eight prompts with every colour, shape and direction, the seventh of the validation split and the last held out
SHOWN = 11 * torch.arange(8) + 7
GALLERY = {  # what the clips of a row come from: its words, and the align study's folder or a shipped file
    "base": ("Base model", "no feedback", WEIGHTS / "base.pt"),
    "sft": ("SFT", "trained on winners", "align/sft-111-0/last.pt"),
    "rwr": ("Flow-RWR", "all clips, weighted by reward", "align/rwr-111-0/last.pt"),
    "dpo": ("Flow-DPO", "winner against loser", "align/dpo-constant-111-0/last.pt"),
    "nrg": ("Flow-NRG 1:1:1", "base model, steered", WEIGHTS / "base.pt"),
}
VALUES = (-4, 0, 1, 4)  # of each slider
STEERED = 6  # prompts


def figure(value):
    """A number as the page shows it."""
    return "–" if math.isnan(value) else f"{value:z.2f}".replace("-", "−")


def sheet(name, videos):
    """The CSS that shows clips (N, 3, T, H, W) as class `name`: a PNG, a row a clip, its frames from left to right.

    6 bits a channel: little more than half the size, and the eye sees no difference."""
    pixels = to_pixels(videos) >> 2  # (N, T, H, W, 3)
    pixels = (pixels << 2 | pixels >> 4).transpose(0, 2, 1, 3, 4)  # (N, H, T, W, 3)
    count, height, frames, width, _ = pixels.shape
    png = imageio.imwrite("<bytes>", pixels.reshape(count * height, frames * width, 3), extension=".png", optimize=True)
    return f".{name} {{ --rows: {count}; background-image: url(data:image/png;base64,{b64encode(png).decode()}) }}\n"


def clip(name, row, label, scores):
    """A clip of a sheet with its true scores (3,) under it."""
    bars = ""
    for n, v in zip(DIMENSIONS, scores):
        bars += f'<span class="{n.lower()}" style="--v: {min(1, max(0, v)):.2f}">'
        bars += f'<span class="hidden">{n} </span>{figure(v)}</span>'
    picture = f'<div class="clip {name}" style="--row: {row}" role="img" aria-label="{escape(label)}"></div>'
    return f'<td>{picture}<div class="score">{bars}</div></td>'


def clip_table(label, prompts, rows):
    """A table of clips, a column a prompt; rows: [(attributes of the row, its head, cells)]."""
    heads = "".join(f'<th scope="col">{world.prompt_text(prompt)}</th>' for prompt in prompts)
    body = "".join(f'<tr{kind}><th scope="row">{head}</th>{cells}</tr>' for kind, head, cells in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="clips">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def steered(weights, model, reward):
    return steer(model, reward, weights, NRG_SCALE, NRG_EPS, NRG_INTERVAL)


def gallery(prompts, args, device):
    """(table, CSS): a row a method of GALLERY, all on the same noise."""
    videos, rows = [], []
    for key, (title, said, source) in GALLERY.items():
        path = next((p for p in (args.work / source, WEIGHTS / f"{key}.pt") if p.exists()), None)
        head = f"{title}<small>{said}</small>"
        if path is None:
            text = "Not trained yet: <code>python evaluate.py align</code> does."
            rows.append(("", head, f'<td colspan="{len(prompts)}" class="soft">{text}</td>'))
            continue
        model, words = load_velocity(path)
        model, guidance = model.to(device), None
        if key == "nrg":
            reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt", model)
            model, guidance = steered((1, 1, 1), model, reward.to(device))
        videos.append(sample_prompts(model, words, prompts, NOISE_SEED, device, guidance=guidance))
        scores = world.oracle(videos[-1], prompts)
        mean = " ".join(f"{n} {figure(v)}" for n, v in zip(DIMENSIONS, scores.mean(0).tolist()))
        start = len(prompts) * (len(videos) - 1)
        cells = [
            clip("shown", start + i, f"{title}: {world.prompt_text(prompts[i])}", scores[i].tolist())
            for i in range(len(prompts))
        ]
        rows.append(("", f"{head}<small>mean {mean}</small>", "".join(cells)))
    return clip_table("Clips, a row a method, a column a prompt", prompts, rows), sheet("shown", torch.cat(videos))


def sliders(prompts, device):
    """Parts of the page: three sliders, the clips that they choose among, sampled here, and their true scores."""
    base, words = load_velocity(WEIGHTS / "base.pt")
    reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt", base)
    base, reward = base.to(device), reward.to(device)
    every = list(itertools.product(VALUES, repeat=3))
    videos = []
    for weights in progress_bar("sampling for the sliders", "weights")(every):
        model, guidance = steered(weights, base, reward)
        videos.append(sample_prompts(model, words, prompts, NOISE_SEED, device, guidance=guidance))
    scores = torch.stack([world.oracle(video, prompts) for video in videos]).tolist()  # (weights, prompts, 3)
    rows, parts, plain, first = [], {}, every.index((0, 0, 0)), every.index((1, 1, 1))
    names = [world.prompt_text(prompt) for prompt in prompts]
    for kind, head, at in (("", "Without guidance", plain), (' id="guided"', "With these weights", first)):
        cells = "".join(clip(f"p{i}", at, f"{head}: {name}", scores[at][i]) for i, name in enumerate(names))
        rows.append((kind, head, cells))
    parts["grid"] = clip_table("Clips without guidance and with the weights chosen above", prompts, rows)
    marks = "".join(f"<span>{value}</span>".replace("-", "−") for value in VALUES)
    parts["sliders"] = "".join(
        f'<div class="{n.lower()}"><label for="w{n}">{n} <span>{MEANING[n]}</span> <b>1</b></label>'
        f'<input id="w{n}" type="range" max="{len(VALUES) - 1}" value="{VALUES.index(1)}" aria-valuetext="1">'
        f'<div class="marks" aria-hidden="true">{marks}</div></div>'
        for n in DIMENSIONS
    )
    rounded = [[[round(v, 3) for v in one] for one in at] for at in scores]
    parts["data"] = json.dumps({"values": VALUES, "prompts": names, "plain": plain, "scores": rounded})
    parts["sheets"] = "".join(sheet(f"p{i}", torch.stack([v[i] for v in videos])) for i in range(len(names)))
    return parts

"""Clips to look at: rows of the report, and the picture of README.md.

In a row of the report every clip has the same prompts and noise as in the others. A row holds its
own pictures; where its checkpoint is missing, the row of an earlier page is taken over as it is."""

import io
import re
from base64 import b64encode
from html import escape
from pathlib import Path

import imageio.v3 as imageio
import torch

import world
from data import DIMENSIONS
from judge import NOISE_SEED, sample_prompts
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from pictures import write_gif
from real_data.video import to_pixels
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput, check_writable
from sample import NRG_EPS, NRG_INTERVAL, NRG_SCALE
from studies import align, online
from studies.policies import NAMES, SETS, prompts_of

# The first eight have every colour, shape and direction; the base model has not seen the eighth
PROMPTS = world.split_prompts(*world.SPLIT_NAMES)[(11 * torch.arange(24) + 7) % 96]
COLUMNS = 8  # of these are shown; means are over all
POLICY = Path("out/dpo/last.pt")  # of the picture


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


def steered_base(device):
    """The base model under guidance with equal weights, and the words that it knows."""
    base, words = load_velocity(WEIGHTS / "base.pt")
    reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt")
    base, reward = base.to(device), reward.to(device)
    return SteeredPolicy(base, reward, (1, 1, 1), NRG_SCALE, NRG_EPS, NRG_INTERVAL), words


# ---------------------------------------------------------------------------------------------
# Rows of the report


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
    strip = pixels.reshape(len(pixels), -1, 3)
    file = io.BytesIO()
    imageio.imwrite(file, strip, extension=".png", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def sampled_row(name, title, note, model, words, device):
    """A table row of a model's clips: mean true scores of all, then the first clips with theirs."""
    videos = sample_prompts(model, words, PROMPTS, NOISE_SEED, device)
    scores = world.oracle(videos, PROMPTS)
    cells = []
    for video, score, prompt in zip(videos[:COLUMNS], scores, PROMPTS):
        label = escape(f"{title}: {world.prompt_text(prompt)}")
        style = f"background-image: url({png(video)})"
        clip = f'<div class="clip" role="img" aria-label="{label}" style="{style}"></div>'
        cells.append(f"<td>{clip}{bars(score)}</td>")
    head = f"{escape(title)}<small>{escape(note)}</small><small>mean of {len(scores)}</small>"
    head = f'<th scope="row">{head}{bars(scores.mean(0))}</th>'
    return f'<tr id="{name}">{head}{"".join(cells)}</tr>'


def rows(settings, before):
    """A table row of each policy, as HTML. before: the text of an earlier report, or ""."""
    found, device = [], settings.device
    for name, (title, note, path) in policies(settings).items():
        earlier = re.search(rf'<tr id="{name}".*?</tr>', before, re.DOTALL)
        if path.exists():
            model, words = load_velocity(path)
            found.append(sampled_row(name, title, note, model.to(device), words, device))
        elif earlier:
            found.append(earlier[0])
            print(f"clips of {title}: as on the page before, since {path} is missing")
        else:
            print(f"clips of {title}: none, since {path} is missing")
    steered, words = steered_base(device)
    title, note = NAMES["nrg-1:1:1"], "base model, steered"
    return [*found, sampled_row("nrg-1-1-1", title, note, steered, words, device)]


# ---------------------------------------------------------------------------------------------
# The picture of README.md


def run(settings):
    """Writes base_above_aligned.gif to --out: the first clips of the standard set that show a wrong
    colour, shape or direction, before and after alignment; prints how often one stays wrong."""
    if not POLICY.exists():
        raise BadInput(f"{POLICY}: no such file; python train.py --algo dpo writes it")
    check_writable(settings.out, "--out")
    prompts = prompts_of("standard", SETS["standard"])
    base, words = load_velocity(WEIGHTS / "base.pt")
    policy, _ = load_velocity(POLICY)
    steered, _ = steered_base(settings.device)
    base, policy = base.to(settings.device), policy.to(settings.device)
    models = {"base": base, "Flow-DPO": policy, "Flow-NRG": steered}
    videos, wrong = {}, {}
    for name, model in models.items():
        videos[name] = sample_prompts(model, words, prompts, NOISE_SEED, settings.device)
        wrong[name] = (world.attributes_right(videos[name], prompts) <= 0.5).any(1)  # (N,)
        still = wrong[name][wrong["base"]].float().mean()
        print(f"{name}: {still:.0%} of the base model's wrong clips are wrong")
    chosen = wrong["base"].nonzero()[:COLUMNS, 0]
    write_gif(
        settings.out / "base_above_aligned.gif",
        [video[chosen] for video in videos.values()],
        zoom=3,
        labels=list(videos),
        captions=[world.prompt_text(prompt) for prompt in prompts[chosen]],
    )
    print(f"wrote {settings.out / 'base_above_aligned.gif'}")

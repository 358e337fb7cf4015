"""Preference pairs as latents: a folder of .npy files and pairs.csv, one row a pair.

    latent_A, latent_B                    both clips (C, T, H, W): the VAE's latents as the transformer takes them
    text                                  the prompt (S, D): the text encoder's last hidden states
    VQ_A, MQ_A, TA_A, VQ_B, MQ_B, TA_B    the clips' scores, for example VideoReward's, normalised; higher is better

and null.npy, the text of no prompt, or of a negative one, for classifier-free guidance. All clips have one shape, all
texts one, so that any make a batch. Float16 will do; a file is read when it is needed.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import DIMENSIONS
from runtime.cli import BadInput

FILES = ("latent_A", "latent_B", "text")
SCORES = [f"{name}_{side}" for side in "AB" for name in DIMENSIONS]


@dataclass
class Pairs:
    files: list  # three paths a pair: both clips and the text
    scores: torch.Tensor  # (N, 2, 3)
    null: Path
    device: torch.device

    @property
    def total(self):
        """(N, 2): r = (VQ + MQ + TA) / 3 (section 5.2)."""
        return self.scores.mean(2)

    def load(self, paths):
        return torch.stack([torch.from_numpy(np.load(path)).float() for path in paths]).to(self.device)

    def clips(self, chosen):
        """Latents (B, C, T, H, W) of chosen (B, 2: pair, side)."""
        return self.load([self.files[pair][side] for pair, side in chosen.tolist()])

    def texts(self, chosen):
        """Embeddings (B, S, D) of their prompts."""
        return self.load([self.files[pair][2] for pair, _ in chosen.tolist()])


def read_pairs(folder, config, device):
    """The Pairs of a folder, for a transformer's config. BadInput names line and column of the first fault."""
    table = folder / "pairs.csv"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{table}: cannot be read ({error})") from None
    if not rows:
        raise BadInput(f"{table}: holds no pair")
    files, scores, shapes = [], [], []
    for line, row in enumerate(rows, 2):
        where = f"{table}, line {line}"
        try:
            files.append([folder / row[name] for name in FILES])
            scores.append([float(row[name]) for name in SCORES])
            if not all(map(math.isfinite, scores[-1])):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{where}: needs files in {', '.join(FILES)} and numbers in {', '.join(SCORES)}") from None
        shapes.append([shape_of(path, f"{where}, column {name}") for name, path in zip(FILES, files[-1])])
        a, b, text = shapes[-1]
        takes = f"({config.in_channels}, T, H, W), T, H, W multiples of {tuple(config.patch_size)}"
        if len(a) != 4 or a[0] != config.in_channels or any(n % p for n, p in zip(a[1:], config.patch_size)):
            raise BadInput(f"{where}, column latent_A: shape {a}; this model takes {takes}")
        if a != b:
            raise BadInput(f"{where}, column latent_B: shape {b}, but latent_A has {a}; a pair needs one shape")
        if len(text) != 2 or text[1] != config.text_dim:
            raise BadInput(f"{where}, column text: shape {text}; this model takes (words, {config.text_dim})")
        if shapes[-1] != shapes[0]:
            raise BadInput(f"{where}: shapes {a} and {text}, but {shapes[0][0]} and {shapes[0][2]} in line 2")
    if shape_of(folder / "null.npy", "the text of no prompt") != text:
        raise BadInput(f"{folder / 'null.npy'}: its shape is not that of the texts, {text}")
    pairs = Pairs(files, torch.tensor(scores).reshape(-1, 2, len(DIMENSIONS)), folder / "null.npy", device)
    if torch.equal(pairs.total[:, 0], pairs.total[:, 1]):
        raise BadInput(f"{table}: no pair has a winner, as both clips of each score the same")
    return pairs


def shape_of(path, where):
    """The shape of a .npy file, from its header alone."""
    try:
        return np.lib.format.open_memmap(path, mode="r").shape
    except (OSError, ValueError, EOFError):
        raise BadInput(f"{where}: {path} is missing, or no .npy file that can be read safely") from None


def write_latents(x0, path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, x0.cpu().numpy())
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def write_tiny(folder, channels=4, text_dim=8, count=16):
    """Made-up pairs: all scores of a clip are one number, by which its first channel is brighter."""
    rng = np.random.default_rng(0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "pairs.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*FILES, *SCORES])
            for pair in range(count):
                names, scores = [f"{pair}-{name}.npy" for name in FILES], rng.standard_normal(2)
                for name, score in zip(names, scores):
                    clip = 0.5 * rng.standard_normal((channels, 2, 8, 8))
                    clip[0] += score
                    np.save(folder / name, clip.astype(np.float16))
                np.save(folder / names[2], rng.standard_normal((6, text_dim)).astype(np.float16))
                writer.writerow([*names, *(f"{score:.4f}" for score in scores.repeat(len(DIMENSIONS)))])
        np.save(folder / "null.npy", np.zeros((6, text_dim), np.float16))
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror}") from None

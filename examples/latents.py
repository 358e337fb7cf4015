"""Preference pairs as latents: a folder of .npy files and pairs.csv, one row a pair.

    latent_A, latent_B    both clips (C, T, H, W): the VAE's latents as the transformer takes them
    text                  the prompt (S, D): the text encoder's last hidden states
    VQ_A, MQ_A, TA_A, VQ_B, MQ_B, TA_B    scores of the clips; higher is better

and null.npy, the text of no prompt or of a negative one, for classifier-free guidance. All clips
have one shape, all texts one. Float16 will do. A file is read when it is needed.
"""

import csv
import math
from dataclasses import dataclass

import numpy as np
import torch

from data import DIMENSIONS
from real_data.video import fit_frame, probe, read_frames
from runtime.cli import BadInput

FILES = ("latent_A", "latent_B", "text")
SCORES = [f"{name}_{side}" for side in "AB" for name in DIMENSIONS]


@dataclass
class Pairs:
    files: list  # of each pair: (path, where it is named) of both clips and of the text
    scores: torch.Tensor  # (N, 2, 3)
    shape: tuple  # of every clip: (C, T, H, W)
    null: torch.Tensor  # (S, D)

    def clips(self, index, side):
        """Latents (B, C, T, H, W) of sides (B,), 0 or 1, of pairs `index` (B,)."""
        chosen = zip(index.tolist(), side.tolist())
        return torch.stack([read_array(*self.files[pair][side]) for pair, side in chosen])

    def texts(self, index):
        """Embeddings (B, S, D) of the prompts of pairs `index` (B,)."""
        return torch.stack([read_array(*self.files[pair][2]) for pair in index.tolist()])


def read_pairs(table, config):
    """The Pairs of a CSV, for a transformer's config. BadInput names line and column of a fault."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(f"{table}, line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{table}: cannot be read ({error})") from None
    if not rows:
        raise BadInput(f"{table}: holds no pair")
    files, scores, shapes = [], [], {}
    for where, row in rows:
        try:
            files.append([(table.parent / row[name], f"{where}, column {name}") for name in FILES])
            scores.append([float(row[name]) for name in SCORES])
        except (KeyError, TypeError, ValueError):
            names = f"{', '.join(FILES)} and numbers in {', '.join(SCORES)}"
            raise BadInput(f"{where}: needs files in {names}") from None
        if not all(map(math.isfinite, scores[-1])):
            raise BadInput(f"{where}: its scores must be finite numbers")
        for kind, (path, place) in zip(("clip", "clip", "text"), files[-1]):
            shape = open_array(path, place).shape
            if shape != shapes.setdefault(kind, shape):
                raise BadInput(f"{place}: shape {shape}, but the first {kind} has {shapes[kind]}")
    clip, text = shapes["clip"], shapes["text"]
    channels, patch, most = config.in_channels, tuple(config.patch_size), config.rope_max_seq_len
    patches = [n / side for n, side in zip(clip[1:], patch)]
    if len(clip) != 4 or clip[0] != channels or any(n not in range(1, most + 1) for n in patches):
        takes = f"({channels}, T, H, W), T, H, W multiples of {patch}, at most {most} times"
        raise BadInput(f"{table}: clips of shape {clip}; this model takes {takes}")
    if len(text) != 2 or not text[0] or text[1] != config.text_dim:
        takes = f"(words, {config.text_dim})"
        raise BadInput(f"{table}: texts of shape {text}; this model takes {takes}")
    null = read_array(table.parent / "null.npy", "the text of no prompt")
    if null.shape != text:
        raise BadInput(f"null.npy: shape {tuple(null.shape)}, but the texts have {text}")
    return Pairs(files, torch.tensor(scores).unflatten(1, (2, 3)), clip, null)


def open_array(path, place):
    """The array of a .npy file, mapped into memory: its numbers are not read yet."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        raise BadInput(f"{place}: {path} is missing, or not a .npy file that can be read") from None
    if array.dtype.kind != "f":
        raise BadInput(f"{place}: {path} holds {array.dtype}, not floating-point numbers")
    return array


def read_array(path, place):
    """The float32 tensor in a .npy file. BadInput names the first number that is not finite."""
    array = torch.from_numpy(open_array(path, place).astype(np.float32))
    if not array.isfinite().all():
        index = tuple(torch.nonzero(~array.isfinite())[0].tolist())
        raise BadInput(f"{place}: {path} holds {array[index].item()} at index {index}")
    return array


def frames_at(path, count=81, fps=16, height=480, width=832):
    """The frames of a video on screen at 0, 1 / fps, ..., (count - 1) / fps seconds, their middle
    averaged down: uint8 (3, count, height, width). BadInput for a damaged or shorter video."""
    times = np.arange(count) / fps
    try:
        shown, facts = probe(path)
        if times[-1] >= facts["seconds"]:
            raise ValueError(
                f"lasts {facts['seconds']:.2f} s; {count} frames at {fps} a second need more than "
                f"{times[-1]:g} s"
            )
        positions = np.searchsorted(shown, times + 1e-6, side="right") - 1  # 1e-6: rounding
        frames = read_frames(path, facts, positions)
        return torch.stack([fit_frame(frame, height, width) for frame in frames], 1)
    except ValueError as error:
        raise BadInput(f"{path} {error}") from None


def write_tiny(folder, channels=4, text_dim=8):
    """Made-up pairs. A clip's scores are one number, by which its first channel is brighter."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "null.npy", np.zeros((6, text_dim), np.float16))
    lines = [",".join((*FILES, *SCORES))]
    for pair in range(16):
        names = [f"{pair}-{name}.npy" for name in FILES]
        scores = rng.standard_normal(2)
        for name, score in zip(names, scores):
            clip = 0.5 * rng.standard_normal((channels, 2, 8, 8))
            clip[0] += score
            np.save(folder / name, clip.astype(np.float16))
        np.save(folder / names[2], rng.standard_normal((6, text_dim)).astype(np.float16))
        lines.append(",".join(names + [f"{score:.4f}" for score in scores.repeat(3)]))
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")

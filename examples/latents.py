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

import numpy as np
import torch

from data import DIMENSIONS
from real_data.video import fit_frame, probe, read_frames
from runtime.cli import BadInput

FILES = ("latent_A", "latent_B", "text")
SCORES = [f"{name}_{side}" for side in "AB" for name in DIMENSIONS]


@dataclass
class Pairs:
    files: list  # a pair: (path, where it is named) of both clips and of the text
    scores: torch.Tensor  # (N, 2, 3)
    shape: tuple  # of every clip: (C, T, H, W)
    null: tuple  # (path, what it is)

    @property
    def total(self):
        """(N, 2): r = (VQ + MQ + TA) / 3 (section 5.2)."""
        return self.scores.mean(2)

    def clips(self, chosen):
        """Latents (B, C, T, H, W) of chosen (B, 2: pair, side)."""
        return torch.stack([read_array(*self.files[pair][side]) for pair, side in chosen.tolist()])

    def texts(self, chosen):
        """Embeddings (B, S, D) of their prompts."""
        return torch.stack([read_array(*self.files[pair][2]) for pair, _ in chosen.tolist()])


def read_pairs(folder, config):
    """The Pairs of a folder, for a transformer's config. BadInput names line and column of the first fault."""
    table = folder / "pairs.csv"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{table}: cannot be read ({error})") from None
    if not rows:
        raise BadInput(f"{table}: holds no pair")
    files, scores = [], []
    for line, row in rows:
        where = f"{table}, line {line}"
        try:
            paths = [folder / row[name] for name in FILES]
            scores.append([float(row[name]) for name in SCORES])
            if not all(map(math.isfinite, scores[-1])):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise BadInput(
                f"{where}: needs files in {', '.join(FILES)} and numbers in {', '.join(SCORES)}"
            ) from None
        files.append([(path, f"{where}, column {name}") for name, path in zip(FILES, paths)])
        a, b, text = (open_array(*file).shape for file in files[-1])
        if len(files) == 1:
            first_clip, first_text = a, text
        sizes = [n / patch for n, patch in zip(a[1:], config.patch_size)]
        places = range(1, config.rope_max_seq_len + 1)
        if len(a) != 4 or a[0] != config.in_channels or any(size not in places for size in sizes):
            takes = (
                f"({config.in_channels}, T, H, W), T, H, W multiples of {tuple(config.patch_size)}"
            )
            takes += f" and at most {config.rope_max_seq_len} times them"
            raise BadInput(f"{where}, column latent_A: shape {a}; this model takes {takes}")
        if a != b:
            raise BadInput(
                f"{where}, column latent_B: shape {b}, but latent_A has {a}; a pair needs one shape"
            )
        if len(text) != 2 or not text[0] or text[1] != config.text_dim:
            raise BadInput(
                f"{where}, column text: shape {text}; this model takes (words, {config.text_dim})"
            )
        if (a, text) != (first_clip, first_text):
            raise BadInput(
                f"{where}: shapes {a} and {text}, but {first_clip} and {first_text} in line {rows[0][0]}"
            )
    null = folder / "null.npy", "the text of no prompt"
    if open_array(*null).shape != first_text:
        raise BadInput(f"{null[0]}: its shape is not that of the texts, {first_text}")
    pairs = Pairs(files, torch.tensor(scores).reshape(-1, 2, len(DIMENSIONS)), first_clip, null)
    if torch.equal(pairs.total[:, 0], pairs.total[:, 1]):
        raise BadInput(f"{table}: no pair has a winner, as both clips of each score the same")
    return pairs


def open_array(path, where):
    """The array of a .npy file, mapped into memory: its numbers are not read yet."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        raise BadInput(
            f"{where}: {path} is missing, or no .npy file that can be read safely"
        ) from None
    if array.dtype.kind != "f":
        raise BadInput(f"{where}: {path} holds {array.dtype}, not floating-point numbers")
    return array


def read_array(path, where):
    """The float32 tensor in a .npy file. BadInput names the first number that is not finite."""
    array = torch.from_numpy(open_array(path, where).astype(np.float32))
    if not array.isfinite().all():
        index = tuple(torch.nonzero(~array.isfinite())[0].tolist())
        raise BadInput(f"{where}: {path} holds {array[index].item()} at index {index}")
    return array


def frames_at(path, count=81, fps=16, height=480, width=832):
    """The frames of a video at the times 0, 1 / fps, ..., (count - 1) / fps, each the one on screen
    at its time, cropped to the middle and averaged down: uint8 (3, count, height, width). BadInput
    if it cannot be decoded or is shorter."""
    times = np.arange(count) / fps
    try:
        shown, facts = probe(path)
        if times[-1] >= facts["seconds"]:
            fault = f"lasts {facts['seconds']:.2f} s; {count} frames at {fps} a second"
            raise ValueError(f"{fault} need more than {times[-1]:g} s")
        positions = np.searchsorted(shown, times + 1e-6, side="right") - 1  # 1e-6: rounding
        frames = read_frames(path, facts, positions)
        return torch.stack([fit_frame(frame, height, width) for frame in frames], 1)
    except ValueError as error:
        raise BadInput(f"{path} {error}") from None


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
                writer.writerow(
                    [*names, *(f"{score:.4f}" for score in scores.repeat(len(DIMENSIONS)))]
                )
        np.save(folder / "null.npy", np.zeros((6, text_dim), np.float16))
    except OSError as error:
        raise BadInput(f"cannot write to {folder}: {error.strerror}") from None

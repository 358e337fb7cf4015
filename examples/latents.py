"""Preference pairs as latents: a CSV in the project's format (docs/data.md) with one more column.

    path_A, path_B    both clips (C, T, H, W): the VAE's latents as the transformer takes them
    text              the prompt (S, D): the text encoder's last hidden states

All are .npy files; float16 will do. All clips have one shape, all texts one.
"""

import numpy as np
import torch

from real_data.pairs_csv import Pair, read_pairs, write_pairs
from real_data.video import fit_frame, probe, read_frames
from runtime.cli import BadInput


class LatentPairs:
    """The pairs of a CSV, for a transformer's config. Clips and texts are read when they are
    needed. BadInput names line and column of a fault.

    label (N, 3) and mos (N, 2, 3) as in data.py; shape (C, T, H, W) of every clip."""

    def __init__(self, table, config):
        rows = read_pairs(table)
        self.label = torch.tensor([row.label for row in rows])
        self.mos = torch.tensor([row.mos or (0.0,) * 6 for row in rows]).unflatten(1, (2, 3))
        clips, self.texts_at = [], []  # (path, where it is named)
        for row in rows:
            place = f"{table}, line {row.line}, column"
            clips.append((table.parent / row.path_a, f"{place} path_A"))
            clips.append((table.parent / row.path_b, f"{place} path_B"))
            self.texts_at.append((table.parent / row.other.get("text", ""), f"{place} text"))
        self.clips_at = clips
        self.shape, text = common_shape(clips), common_shape(self.texts_at)
        sides = zip(self.shape[1:], config.patch_size)
        if self.shape[0] != config.in_channels or any(n % side for n, side in sides):
            takes = f"({config.in_channels}, T, H, W), multiples of {tuple(config.patch_size)}"
            raise BadInput(f"{table}: clips of shape {self.shape}; this model takes {takes}")
        if text[1:] != (config.text_dim,):
            takes = f"(words, {config.text_dim})"
            raise BadInput(f"{table}: texts of shape {text}; this model takes {takes}")

    def clips(self, index, side):
        """Latents (B, C, T, H, W) of sides (B,), 0 or 1, of pairs `index` (B,)."""
        return torch.stack([read_array(*self.clips_at[i]) for i in (2 * index + side).tolist()])

    def texts(self, index):
        """Embeddings (B, S, D) of the prompts of pairs `index` (B,)."""
        return torch.stack([read_array(*self.texts_at[i]) for i in index.tolist()])


def common_shape(files):
    """The shape of all arrays in [(path, where it is named)]."""
    first = open_array(*files[0]).shape
    for path, place in files:
        shape = open_array(path, place).shape
        if shape != first:
            raise BadInput(f"{place}: shape {shape}, but that of line 2 has {first}")
    return first


def open_array(path, place):
    """The array of a .npy file, mapped into memory: its numbers are not read yet."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        raise BadInput(f"{place}: {path} is missing, or not a .npy file that can be read") from None


def read_array(path, place):
    """The float32 tensor in a .npy file. BadInput names the first number that is not finite."""
    array = torch.from_numpy(open_array(path, place).astype(np.float32))
    if not array.isfinite().all():
        index = tuple(torch.nonzero(~array.isfinite())[0].tolist())
        raise BadInput(f"{place}: {path} holds {array[index].item()} at index {index}")
    return array


def frames_at(path, count=81, fps=16, height=480, width=832):
    """The frames of a video on screen at 0, 1 / fps, ..., (count - 1) / fps seconds, their middle
    averaged down: uint8 (3, count, height, width). ValueError for a damaged or shorter video."""
    shown, facts = probe(path)
    times = np.arange(count) / fps
    if times[-1] >= facts["seconds"]:
        need = f"{count} frames at {fps} a second need more than {times[-1]:g} s"
        raise ValueError(f"{path} lasts {facts['seconds']:.2f} s; {need}")
    positions = np.searchsorted(shown, times + 1e-6, side="right") - 1  # 1e-6: rounding
    frames = read_frames(path, facts, positions)
    return torch.stack([fit_frame(frame, height, width) for frame in frames], 1)


def write_tiny(folder):
    """16 made-up pairs for wan_model.write_tiny: the better clip has a brighter first channel."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(16):
        brightness = rng.standard_normal(2)
        for side, level in zip("AB", brightness):
            clip = 0.5 * rng.standard_normal((4, 2, 8, 8))
            clip[0] += level
            np.save(folder / f"{i}-{side}.npy", clip.astype(np.float16))
        np.save(folder / f"{i}-text.npy", rng.standard_normal((6, 8)).astype(np.float16))
        label = (1 if brightness[0] > brightness[1] else -1,) * 3
        text = {"text": f"{i}-text.npy"}
        rows.append(Pair(f"{i}-A.npy", f"{i}-B.npy", "a", label, 16, 2, 16, 2, other=text))
    write_pairs(rows, folder / "pairs.csv")

"""A video's frames and the model's clip of them, all in memory."""

import numpy as np
import torch

from real_data.video import fit_frame, frame_positions, middle, probe, read_frames


def sample_frames(path, least=8):
    """uint8 (n, H, W, 3), at 2 frames a second."""
    times, facts = probe(path)
    return np.stack(list(read_frames(path, facts, frame_positions(times, facts, least))))


def fit(frames, length, height, width=None):
    """The middle of frames: uint8 (n, H, W, 3) -> uint8 (3, length, height, width)."""
    chosen = frames[middle(len(frames), length)]
    return torch.stack([fit_frame(frame, height, width or height) for frame in chosen], 1)

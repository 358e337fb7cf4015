"""Files by hand: clips in a cache, pictures, and latents of the toy."""

import os
import sys
from dataclasses import replace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import pictures
from data import INVALID, Vocabulary
from examples import toy_latents
from model import ModelConfig
from real_data import video
from real_data.dataset import usable_rows
from real_data.pairs_csv import Pair, read_pairs
from real_data.toy_pairs import annotated_pairs
from runtime.cli import BadInput
from settings import Data


def write(path, count, fps, size=32):
    """A video whose frame i has brightness 10 i."""
    frames = [np.full((size, size, 3), 10 * i, np.uint8) for i in range(count)]
    imageio.mimwrite(path, frames, format="FFMPEG", fps=fps, quality=9, macro_block_size=1)
    return path


def test_a_cache_tells_lengths_and_sizes_of_one_video_apart(tmp_path):
    path = write(tmp_path / "a.mp4", 8, 2)
    for _ in range(2):
        for length, size in ((8, 32), (4, 32), (8, 16)):
            clip = video.cached_clip(path, tmp_path / "cache", length, size)
            assert clip.shape == (3, length, size, size)
            assert clip[0, 0].float().mean().item() == pytest.approx(10 * (8 - length) / 2, abs=3)
    slower = video.cached_clip(path, tmp_path / "cache", 4, 32, fps=1.0)  # the whole clip
    assert slower[0, [0, 3]].float().mean((1, 2)).tolist() == pytest.approx([0, 70], abs=3)
    before = video.cached_file(path, tmp_path / "cache", 8, 32, 32)
    os.utime(path, ns=(0, 0))  # as if it had been written anew, with as many bytes
    assert video.cached_file(path, tmp_path / "cache", 8, 32, 32) != before


def test_pixels_are_rounded_and_cut():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert video.to_bytes(values).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert video.to_video(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_pictures_have_a_row_for_each_batch_or_clip_and_a_column_for_each_clip_or_frame(tmp_path):
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0]).reshape(2, 2, 1, 1, 1, 1)
    pictures.write_gif(tmp_path / "x.gif", list(values.expand(2, 2, 3, 4, 8, 8)), zoom=1)
    sheet = values[..., 0].transpose(1, 2).expand(2, 3, 2, 8, 8)
    pictures.write_sheet(tmp_path / "x.png", sheet, zoom=1)
    for picture in imageio.mimread(tmp_path / "x.gif")[0], imageio.imread(tmp_path / "x.png"):
        # two lines of grey around each picture of 8 x 8
        shown = [picture[6 + 12 * row, 6 + 12 * column, 0] for row in (0, 1) for column in (0, 1)]
        assert np.allclose(np.array(shown, float), [0, 128, 191, 255], atol=8)


def test_toy_latents_are_the_pairs_that_their_csv_names(tmp_path, monkeypatch):
    for seed in (0, 1):
        out = tmp_path / str(seed)
        monkeypatch.setattr(
            sys, "argv", ["toy_latents.py", str(out), "--pairs=6", f"--seed={seed}"]
        )
        toy_latents.main()
        pairs = annotated_pairs(6, ["train"], seed, ModelConfig(), Vocabulary())
        clips = torch.stack(pairs.sides(torch.arange(6)), 1)
        mean, std = clips.mean(), clips.std()
        for i, row in enumerate(read_pairs(out / "pairs.csv")):
            assert row.prompt == Vocabulary().decode(pairs.y[i])
            assert list(row.label) == pairs.label[i].tolist() and INVALID not in row.label
            for clip, path in zip(clips[i], row.paths):
                latent = torch.tensor(video.read_latent(out / path))
                squares = ((0, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1))
                for c, dy, dx in squares:  # of 2 x 2 pixels, channel by channel
                    wanted = (clip[c, :, dy::2, dx::2] - mean) / std
                    assert torch.allclose(latent[4 * c + 2 * dy + dx].float(), wanted, atol=1e-4)


def test_a_wrong_number_of_frames_is_seen_in_every_row_and_in_the_cache(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, 8, 2)
    clip = ("a.mp4", "b.mp4", "a red circle moving left", (1, 1, 1), 2.0, 8.0, 2.0, 8.0)
    first = Pair(*clip, line=2)
    second = replace(first, frames_a=999.0, line=3)

    def load(*rows):
        settings = Data(cache=tmp_path / "cache")
        return usable_rows(rows, tmp_path / "pairs.csv", ModelConfig(), settings)[0]

    assert len(load(first)) == 1  # and the clips are in the cache now
    with pytest.raises(BadInput, match="line 3, column path_A: video a.mp4 breaks off"):
        load(first, second)

"""Files by hand: frames of videos, clips in a cache, pictures, and latents of the toy."""

import os
import sys

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from frames import fit, sample_frames

import pictures
from data import INVALID, Vocabulary
from examples import toy_latents
from model import ModelConfig
from real_data import video
from real_data.pairs_csv import read_pairs
from real_data.toy_pairs import annotated_pairs


def write(path, count, fps, size=32):
    """A video whose frame i has brightness 10 i."""
    frames = [np.full((size, size, 3), 10 * i, np.uint8) for i in range(count)]
    imageio.mimwrite(path, frames, format="FFMPEG", fps=fps, quality=9, macro_block_size=1)
    return path


def test_a_portrait_clip_is_its_middle_square_averaged_down():
    # of 16 rows and 8 columns rows 4 to 11 are seen, four to a pixel: 200 / 4 and (60 + 40) / 4
    frames = np.zeros((2, 16, 8, 3), np.uint8)
    frames[:, [0, 15]], frames[:, 4], frames[:, 8], frames[:, 11] = 255, 200, 60, 40
    assert fit(frames, 2, 2)[0, 0].tolist() == [[50, 50], [25, 25]]
    turned = frames.transpose(0, 2, 1, 3)
    assert fit(turned, 2, 2)[0, 0].tolist() == [[50, 25], [50, 25]]


@pytest.mark.parametrize(("count", "first"), [(4, 0), (5, 0), (7, 1), (8, 2)])
def test_the_middle_frames_of_a_longer_clip(count, first):
    frames = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(2, 1)
    frames = frames.repeat(2, 2).repeat(3, 3)
    assert fit(frames, 4, 2)[0, :, 0, 0].tolist() == list(range(first, first + 4))


def test_two_frames_a_second_to_the_next_even_number(tmp_path):
    # 22 frames at 4 a second are 5.5 s: 11 frames at 2 a second, so 12, at 0, 21 / 11, 42 / 11 ...
    frames = sample_frames(write(tmp_path / "a.mp4", 22, 4))
    places = [round(21 / 11 * i) for i in range(12)]
    assert [frame.mean() for frame in frames] == pytest.approx(
        [10 * place for place in places], abs=3
    )


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
                for c, dy, dx in (
                    (0, 0, 0),
                    (1, 0, 1),
                    (2, 1, 0),
                    (2, 1, 1),
                ):  # a square of pixels, channel by channel
                    wanted = (clip[c, :, dy::2, dx::2] - mean) / std
                    assert torch.allclose(latent[4 * c + 2 * dy + dx].float(), wanted, atol=1e-4)

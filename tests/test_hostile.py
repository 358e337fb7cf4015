"""Files that used to be taken in silence, or that ended in a traceback."""

import zipfile
from dataclasses import replace

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from model import ModelConfig
from real_data.pairs_csv import Pair, read_pairs, usable_rows
from reward import load_reward
from runtime.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from runtime.cli import BadInput
from settings import Data


@pytest.mark.parametrize(
    ("tensor", "value", "words"),
    [
        ("mean", float("nan"), "'mean' must hold finite"),
        ("mean", float("inf"), "'mean' must hold finite"),
        ("std", 0.0, "std is not positive"),
        ("std", -1.0, "std is not positive"),
    ],
)
def test_a_reward_whose_unit_is_no_number(tmp_path, tensor, value, words):
    state = load_checkpoint(WEIGHTS / "reward.pt")
    state["model"][tensor][0] = value
    save_checkpoint(tmp_path / "reward.pt", state)
    with pytest.raises(BadInput, match=words):
        load_reward(tmp_path / "reward.pt")


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(WEIGHTS / "nrg.pt") as stored:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in stored.infolist():
                packed.writestr(entry.filename, stored.read(entry))
    assert torch.load(path)  # torch would take it
    with pytest.raises(BadInput, match="not a checkpoint that can be read safely"):
        load_checkpoint(path)


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    header = "path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B\n"
    (tmp_path / "pairs.csv").write_text(header + "a.mp4,b.mp4,a red circle,A,A,A,2,8,2,8\n")
    with pytest.raises(BadInput, match="line 2, column path_A"):
        read_pairs(tmp_path / "pairs.csv")


def test_a_wrong_number_of_frames_is_seen_in_every_row_and_in_the_cache(tmp_path):
    frames = list(np.zeros((8, 32, 32, 3), np.uint8))
    for name in ("a.mp4", "b.mp4"):
        imageio.mimwrite(tmp_path / name, frames, format="FFMPEG", fps=2)
    clip = ("a.mp4", "b.mp4", "a red circle moving left", (1, 1, 1), 2.0, 8.0, 2.0, 8.0)
    first = Pair(*clip, line=2)
    second = replace(first, frames_a=999.0, line=3)

    def load(*rows):
        settings = Data(cache=tmp_path / "cache")
        return usable_rows(rows, tmp_path / "pairs.csv", ModelConfig(), settings)[0]

    assert len(load(first)) == 1  # and the clips are in the cache now
    with pytest.raises(BadInput, match="line 3, column path_A: video a.mp4 breaks off"):
        load(first, second)

"""Input that used to be taken without a word, or that ended in a traceback: each is refused in one line, status 2, and
nothing is written."""

import sys
import zipfile

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import data
import sample
import train
from model import ModelConfig, load_velocity
from real_data.disk_pairs import disk_pairs
from real_data.pairs_csv import Pair, read_pairs
from reward import accuracy_with_ties, load_reward
from runtime import cli
from runtime.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from runtime.cli import BadInput


def refused(main, argv, monkeypatch, capsys):
    """The one line with which a command refuses its flags."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    "flags",
    [
        f"--seed {2**45}",
        f"--eval-seed {2**45}",
        "--seed -1",
        "--steps 99999999999999999999",
        "--steps 0",
        "--lora-rank -1",
        "--pairs -3",
        "--freeze -1",
        "--beta 0",
        "--lr nan",
        "--ema 1.5",
        "--label-dropout -0.1",
        "--align 1,1",
        "--align 1,nan,1",
        "--algo rwr --temperature 0",
        "--device meta",
    ],
)
def test_training_refuses_a_flag(flags, tmp_path, monkeypatch, capsys):
    *_, name, _ = flags.split()
    said = refused(
        train.main,
        ["train.py", *flags.split(), "--out", str(tmp_path / "run")],
        monkeypatch,
        capsys,
    )
    assert name in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--n 99999999999",
        "--n 0",
        f"--seed {2**45}",
        "--cfg inf",
        "--nrg-eps -1",
        "--nrg-interval 0.9,0",
        "--nrg-interval 0,2",
        "--nrg 1,1",
        "--device meta",
    ],
)
def test_sampling_refuses_a_flag(flags, tmp_path, monkeypatch, capsys):
    name, _ = flags.split()
    said = refused(
        sample.main,
        ["sample.py", *flags.split(), "--out", str(tmp_path / "run")],
        monkeypatch,
        capsys,
    )
    assert name in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--nrg 1e39,0,0", "--nrg 1,0,0 --nrg-scale 1e38", "--cfg 1e38"])
def test_samples_that_are_no_numbers_are_not_written(flags, tmp_path, monkeypatch, capsys):
    argv = ["sample.py", *flags.split(), "--n", "1", "--steps", "3", "--out", str(tmp_path / "run")]
    assert "not finite" in refused(sample.main, argv, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def changed(name, tensor, value, folder):
    """A copy of a shipped file with one number of one tensor changed."""
    state = load_checkpoint(WEIGHTS / name)
    state["model"][tensor] = state["model"][tensor].clone()
    state["model"][tensor].view(-1)[0] = value
    save_checkpoint(folder / name, state)
    return folder / name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    with pytest.raises(BadInput, match=r"'patch_in.weight' holds numbers that are not finite"):
        load_velocity(changed("base.pt", "patch_in.weight", value, tmp_path))
    with pytest.raises(BadInput, match="'mean' holds numbers that are not finite"):
        load_reward(changed("reward.pt", "mean", value, tmp_path))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_reward_whose_unit_is_nothing(value, tmp_path):
    with pytest.raises(BadInput, match="std"):
        load_reward(changed("reward.pt", "std", value, tmp_path))


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(WEIGHTS / "nrg.pt") as stored:
        with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in stored.infolist():
                packed.writestr(entry.filename, stored.read(entry))
    assert torch.load(tmp_path / "packed.pt", weights_only=True)  # torch would take it
    with pytest.raises(BadInput, match="not a checkpoint that can be read safely"):
        load_checkpoint(tmp_path / "packed.pt")


HEADER = "path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B\n"


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    (tmp_path / "pairs.csv").write_text(HEADER + "a.mp4,b.mp4,a red circle,A,A,A,2,8,2,8\n")
    with pytest.raises(BadInput, match="line 2, column path_A"):
        read_pairs(tmp_path / "pairs.csv")


def test_a_wrong_number_of_frames_is_seen_in_every_row_and_in_the_cache(tmp_path):
    config, words = ModelConfig(vocab=17), data.Vocabulary()
    for name in "ab":
        imageio.mimwrite(
            tmp_path / f"{name}.mp4",
            list(np.zeros((8, 32, 32, 3), np.uint8)),
            format="FFMPEG",
            fps=2,
        )

    def row(line, frames):
        return Pair(
            "a.mp4",
            "b.mp4",
            "a red circle moving left",
            (1, 1, 1),
            2.0,
            frames,
            2.0,
            8.0,
            line=line,
        )

    def load(rows):
        return disk_pairs(rows, tmp_path / "pairs.csv", config, words, tmp_path / "cache")

    assert len(load([row(2, 8.0)])) == 1  # and the clips are in the cache now
    with pytest.raises(BadInput, match="line 3, column path_A: video a.mp4 breaks off"):
        load([row(2, 8.0), row(3, 999.0)])


def test_tie_calibration_may_find_that_no_tie_is_best():
    # one decided pair that is right, two that are wrong only if called ties: each threshold of 1, 2, 3 loses one more
    delta, label = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1, 1, -1])
    assert accuracy_with_ties(delta, label) == (1.0, -1.0)
    # brute force on random cases
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        delta = torch.randint(-4, 5, (12,), generator=rng).float()
        label = torch.randint(-1, 2, (12,), generator=rng)
        tried = [
            torch.where(delta.abs() <= c, (label == 0), (torch.sign(delta) == label) & (label != 0))
            .float()
            .mean()
            .item()
            for c in (-1.0, *delta.abs().tolist())
        ]
        assert accuracy_with_ties(delta, label)[0] == pytest.approx(max(tried))

"""Pre-encoded latents as data, clips of any size, and one's own data for every algorithm."""

import json
from dataclasses import replace

import forked
import numpy as np
import pytest
import torch
from forked import command, ended, fork, weights, with_read

import sample
import tasks
from data import vocabulary_of
from model import ModelConfig
from real_data import video
from real_data.dataset import pairs_of, usable_rows
from real_data.pairs_csv import Pair, read_pairs, write_pairs
from runtime.cli import BadInput
from settings import Data, settings_of

SHAPE = 5, 4, 6, 8  # channels, frames, height, width
PROMPTS = ["a red circle moving left", "A cat jumps over the dog", "the sea"]


@pytest.fixture
def latents(tmp_path):
    """A CSV of six pairs of latents in all three forms, and the arrays by path."""
    rng = np.random.default_rng(0)
    shard = rng.standard_normal((4, *SHAPE)).astype(np.float16)
    np.save(tmp_path / "shard.npy", shard)
    arrays = {f"shard.npy:{i}": shard[i] for i in range(4)}
    for i in range(4):
        arrays[f"{i}.npy"] = rng.standard_normal(SHAPE).astype(np.float32)
        np.save(tmp_path / f"{i}.npy", arrays[f"{i}.npy"])
        arrays[f"{i}.npz"] = rng.standard_normal(SHAPE)
        np.savez_compressed(tmp_path / f"{i}.npz", latent=arrays[f"{i}.npz"])
    names = list(arrays)
    labels = [(1, -1, 0), (0, 0, 1), (-1, 1, 1), (1, 1, -1), (0, -1, 1), (-1, 0, 0)]
    numbers = 2.0, 4.0, 2.0, 4.0
    rows = [Pair(names[i], names[-1 - i], PROMPTS[i % 3], labels[i], *numbers) for i in range(6)]
    write_pairs(rows, tmp_path / "pairs.csv")
    return tmp_path / "pairs.csv", arrays


def load(rows, path, skipped=None):
    vocabulary, settings = vocabulary_of(PROMPTS), Data(cache=path.parent / "cache")
    sizes = {"channels": 5, "frames": 4, "size": (6, 8), "patch": (2, 3, 4)}
    config = ModelConfig(**sizes, vocab=len(vocabulary.words))
    rows, _ = usable_rows(rows, path, config, settings, skipped)
    return pairs_of(rows, path, config, vocabulary, settings)


def test_latents_are_read_as_they_are_and_mapped(latents):
    path, arrays = latents
    rows = read_pairs(path)
    for name, array in arrays.items():
        assert np.array_equal(video.read_latent(path.parent / name), array)
    assert isinstance(video.read_latent(path.parent / "shard.npy:3"), np.memmap)
    pairs = load(rows, path)
    index = torch.tensor([4, 1])
    for side, clips in enumerate(pairs.sides(index)):
        for i, clip in zip(index.tolist(), clips):
            assert torch.equal(clip, torch.tensor(arrays[rows[i].paths[side]]).float())
    cached = [np.load(file).files for file in (path.parent / "cache").iterdir()]
    assert cached == [["facts"]] * 12  # no clip is copied
    (path.parent / "shard.npy").unlink()
    with pytest.raises(BadInput, match="shard.npy:0: cannot be read any more .No such file"):
        pairs.sides(torch.tensor([0]))


FAULTS = {  # name: (array or bytes, fault)
    "text.npy": (b"no array", "cannot be read as one array"),
    "integers.npy": (np.zeros(SHAPE, np.int64), "holds int64, not floating-point numbers"),
    "three.npy": (np.zeros(SHAPE[1:]), "has shape (4, 6, 8); (C, T, H, W) is needed"),
    "other.npy": (np.zeros((5, 4, 8, 6)), "has shape (5, 4, 8, 6); the model takes (5, 4, 6, 8)"),
    "nan.npy": (np.full(SHAPE, np.nan), "not finite: 960, the first at [0, 0, 0, 0]"),
    "shard.npy:4": (None, "is row 4 of a shard of 4"),
    "0.npy:0": (None, "has shape (5, 4, 6, 8); (N, C, T, H, W) is needed"),
}


def test_bad_latents_name_line_and_column_and_can_be_skipped(latents):
    path, _ = latents
    good = read_pairs(path)[0]
    rows = [good]
    for line, (name, (content, _)) in enumerate(FAULTS.items(), 3):
        if isinstance(content, bytes):
            (path.parent / name).write_bytes(content)
        elif content is not None:
            np.save(path.parent / name, content)
        rows.append(replace(good, path_b=name, line=line))
        with pytest.raises(BadInput, match=f"line {line}, column path_B: latent {name} "):
            load([good, rows[-1]], path)
    skipped = []
    assert len(load(rows, path, skipped)) == 1 and len(skipped) == len(FAULTS)
    for fault, (_, text) in zip(skipped, FAULTS.values()):
        assert text in str(fault) and "\n" not in str(fault)


def test_every_algorithm_trains_on_latents(latents, tmp_path, monkeypatch, capsys):
    path, _ = latents
    log = tmp_path / "log"

    def train_tiny(*flags):
        forked.model.PRESETS["nano"] = replace(forked.TINY, patch=(2, 2, 2))  # fits 4 x 6 x 8
        command(*flags)

    def run(algo, *flags):
        flags = [f"--algo={algo}", f"--data={path}", f"--out={tmp_path / algo}", *flags]
        flags = with_read([*flags, "--steps=3", "--batch=4"], "--freeze=1", "--lora-rank=2")
        log.unlink(missing_ok=True)
        assert ended(fork(train_tiny, *flags, output=log)) == 0, log.read_text()
        lines = (tmp_path / algo / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3 and all(np.isfinite(json.loads(line)["loss"]) for line in lines)
        return log.read_text()

    assert "the oracle knows the toy world alone" in run("pretrain", "--attention=tile:1,3,2/1,1,1")
    before = weights(tmp_path / "pretrain")
    assert before["patch_in.weight"].shape[1] == 5 * 8  # channels times the patch's volume
    # a third of the twelve clips is held out: too few for z-scores
    assert "z-scores stand on 12 distinct clips, fewer than 100" in run("reward")
    models = [f"--init={tmp_path / 'pretrain/last.pt'}", f"--reward={tmp_path / 'reward/last.pt'}"]
    assert "pairs of prompts held out of training, accuracy" in run("nrg", *models)
    for algo in ("sft", "rwr", "dpo"):
        out = run(algo, *models)
        assert f"{algo} wins, VideoReward" in out and "base, z-score" in out and "oracle" not in out
    after = weights(tmp_path / "dpo")
    assert any(not torch.equal(after[name], before[name]) for name in before)
    flags = ["--prompt=A cat / in space", "--n=2", "--steps=2", f"--out={tmp_path / 'samples'}"]
    files = [f"--ckpt={tmp_path / 'dpo/last.pt'}", f"--nrg-ckpt={tmp_path / 'nrg/last.pt'}"]
    monkeypatch.setattr("sys.argv", ["sample.py", *flags, *files, "--nrg=1,1,1"])
    sample.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "prompt: 50.0% of the words unknown, 0 cut to 6 words"  # in and space
    assert second == f"wrote {tmp_path / 'samples' / 'a-cat-in-space-nrg'}.npy"
    assert np.load(tmp_path / "samples" / "a-cat-in-space-nrg.npy").shape == (2, 2, *SHAPE)


def test_a_size_of_its_own_is_height_before_width_and_needs_data(tmp_path):
    settings = settings_of(["--algo=pretrain", "--size=32x56", f"--out={tmp_path / 'run'}"])
    assert settings.size == (32, 56) and ModelConfig(size=settings.size).grid == (4, 4, 7)
    with pytest.raises(BadInput, match="clips of 32x56 need --data"):
        tasks.TASKS["pretrain"](settings, torch.device("cpu"))

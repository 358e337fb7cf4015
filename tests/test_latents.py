"""Pre-encoded latents as data, and a CSV of one's own for every algorithm."""

import json
from dataclasses import replace

import forked
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from forked import command, ended, fork, weights, with_read

import sample
import tasks
import train
from data import vocabulary_of
from model import ModelConfig, load_velocity
from real_data import export_toy, video
from real_data.disk_pairs import disk_pairs
from real_data.pairs_csv import Pair, read_pairs, write_pairs
from runtime.cli import BadInput
from settings import settings_of

SHAPE = 5, 4, 6, 8  # channels, frames, height, width
PROMPTS = ["a red circle moving left", "A cat jumps over the dog", "the sea"]


@pytest.fixture
def latents(tmp_path):
    """A folder with six pairs of latents in all three forms: their CSV, and the arrays by path."""
    rng = np.random.default_rng(0)
    arrays = {}
    shard = rng.standard_normal((4, *SHAPE)).astype(np.float16)
    np.save(tmp_path / "shard.npy", shard)
    arrays |= {f"shard.npy:{i}": shard[i] for i in range(4)}
    for i in range(4):
        arrays[f"{i}.npy"] = rng.standard_normal(SHAPE).astype(np.float32)
        np.save(tmp_path / f"{i}.npy", arrays[f"{i}.npy"])
        arrays[f"{i}.npz"] = rng.standard_normal(SHAPE)
        np.savez_compressed(tmp_path / f"{i}.npz", latent=arrays[f"{i}.npz"])
    names = list(arrays)
    labels = [(1, -1, 0), (0, 0, 1), (-1, 1, 1), (1, 1, -1), (0, -1, 1), (-1, 0, 0)]
    numbers = 2.0, 4.0, 2.0, 4.0
    rows = [
        Pair(names[i], names[-1 - i], PROMPTS[i % 3], labels[i], *numbers, line=i + 2)
        for i in range(6)
    ]
    write_pairs(rows, tmp_path / "pairs.csv")
    return tmp_path / "pairs.csv", arrays


def test_latents_are_read_as_they_are_and_mapped(latents):
    path, arrays = latents
    rows = read_pairs(path)
    assert [row.path_a for row in rows[:3]] == ["shard.npy:0", "shard.npy:1", "shard.npy:2"]
    for name, array in arrays.items():
        assert np.array_equal(video.read_latent(path.parent / name), array)
    assert isinstance(video.read_latent(path.parent / "shard.npy:3"), np.memmap)
    vocabulary = vocabulary_of(PROMPTS)
    config = ModelConfig(
        channels=5, frames=4, size=(6, 8), patch=(2, 3, 4), vocab=len(vocabulary.words)
    )
    pairs = disk_pairs(rows, path, config, vocabulary, path.parent / "cache")
    a, b = pairs.sides(torch.tensor([4, 1]))
    assert torch.equal(
        a, torch.stack([torch.tensor(arrays[rows[i].path_a]).float() for i in (4, 1)])
    )
    assert torch.equal(
        b, torch.stack([torch.tensor(arrays[rows[i].path_b]).float() for i in (4, 1)])
    )
    cached = [np.load(file).files for file in (path.parent / "cache").iterdir()]
    assert cached == [["facts"]] * 12  # nothing is copied


def test_a_path_with_a_row():
    assert video.latent_file("a/shard.npy:12") == ("a/shard.npy", 12)
    for plain in ("a.npy", "a.npz:3", "clip:3", "a.npy:", "a.npy:-1", "C:a.mp4"):
        assert video.latent_file(plain) == (plain, None)
    assert (
        video.is_latent("a.NPY") and video.is_latent("s.npy:0") and not video.is_latent("npy.mp4")
    )


def text(name):
    def make(folder):
        (folder / "bad.npy").write_text("no array")

    return make, "bad.npy cannot be read as one array"


def saved(array, said, name="bad.npy"):
    def make(folder):
        np.save(folder / name, array)

    return make, said


FAULTS = {
    "text": text("bad.npy"),
    "integers": saved(np.zeros(SHAPE, np.int64), "holds int64, not floating-point numbers"),
    "three": saved(np.zeros(SHAPE[1:], np.float32), "has shape (4, 6, 8); (C, T, H, W) is needed"),
    "other": saved(
        np.zeros((5, 4, 8, 6), np.float32), "has shape (5, 4, 8, 6); the model takes (5, 4, 6, 8)"
    ),
    "nan": saved(np.full(SHAPE, np.nan, np.float16), "not finite: 960, the first at [0, 0, 0, 0]"),
    "too large": saved(np.full(SHAPE, 1e39), "not finite: 960, the first at [0, 0, 0, 0]"),
    "objects": saved(np.array([{}], object), "cannot be read as one array"),
    "row": (lambda folder: None, "is row 4 of a shard of 4"),
    "video": (lambda folder: (folder / "bad.mp4").touch(), "cannot be decoded"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_latents_name_line_and_column(latents, fault):
    path, _ = latents
    make, said = FAULTS[fault]
    make(path.parent)
    bad = {"row": "shard.npy:4", "video": "bad.mp4"}.get(fault, "bad.npy")
    rows = [*read_pairs(path)]
    rows[3] = replace(rows[3], path_b=bad)
    vocabulary = vocabulary_of(PROMPTS)
    config = ModelConfig(
        channels=5, frames=4, size=(6, 8), patch=(2, 3, 4), vocab=len(vocabulary.words)
    )
    with pytest.raises(BadInput) as error:
        disk_pairs(rows, path, config, vocabulary, path.parent / "cache")
    assert "line 5, column path_B" in str(error.value) and said in str(error.value)
    skipped = []
    assert (
        len(disk_pairs(rows, path, config, vocabulary, path.parent / "cache", skipped)) == 5
        and len(skipped) == 1
    )


def test_a_clip_that_goes_away_during_training_ends_in_one_line(latents):
    path, _ = latents
    rows = read_pairs(path)
    vocabulary = vocabulary_of(PROMPTS)
    config = ModelConfig(
        channels=5, frames=4, size=(6, 8), patch=(2, 3, 4), vocab=len(vocabulary.words)
    )
    pairs = disk_pairs(rows, path, config, vocabulary, path.parent / "cache")
    (path.parent / "shard.npy").unlink()
    with pytest.raises(BadInput, match="shard.npy:0: cannot be read any more .No such file"):
        pairs.sides(torch.tensor([0]))


def test_every_algorithm_trains_on_latents(latents, tmp_path, monkeypatch, capsys):
    """From nothing to an aligned model: pretrain and reward, then nrg, sft, rwr and dpo on these two."""
    path, _ = latents
    log = tmp_path / "log"

    def run(algo, *flags):
        import forked

        forked.TINY = replace(forked.TINY, patch=(2, 2, 2))  # for a clip of 4 x 6 x 6
        shared = [
            f"--algo={algo}",
            f"--data={path}",
            f"--out={tmp_path / algo}",
            "--steps=3",
            "--batch=4",
        ]
        log.unlink(missing_ok=True)
        assert ended(fork(command, *with_read([*shared, *flags], "--freeze=1"), output=log)) == 0, (
            log.read_text()
        )
        lines = (tmp_path / algo / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3 and all(np.isfinite(json.loads(line)["loss"]) for line in lines)
        return log.read_text()

    assert "the oracle knows the toy world alone" in run("pretrain")
    made = weights(tmp_path / "pretrain")
    assert made["patch_in.weight"].shape[1] == 5 * 8  # channels times the patch's volume
    # a third of the twelve clips is held out: too few for z-scores
    assert "z-scores stand on 12 distinct clips, fewer than 100" in run("reward")
    models = [
        f"--init={tmp_path / 'pretrain' / 'last.pt'}",
        f"--reward={tmp_path / 'reward' / 'last.pt'}",
    ]
    assert "pairs of prompts held out of training, accuracy" in run("nrg", *models)
    for algo in ("sft", "rwr", "dpo"):
        out = run(algo, *models)
        assert f"{algo} wins, VideoReward" in out and "base, z-score" in out and "oracle" not in out
    changed = weights(tmp_path / "dpo")
    assert any(not torch.equal(changed[name], made[name]) for name in made)
    flags = [
        "--ckpt",
        tmp_path / "dpo" / "last.pt",
        "--prompt",
        "A cat / in space",
        "--n",
        2,
        "--steps",
        2,
    ]
    monkeypatch.setattr(
        "sys.argv", ["sample.py", *map(str, flags), "--out", str(tmp_path / "samples")]
    )
    sample.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "prompt: 50.0% of the words unknown, 0 cut to 6 words"  # in and space
    assert second == f"wrote {tmp_path / 'samples' / 'a-cat-in-space'}.npy"
    assert np.load(tmp_path / "samples" / "a-cat-in-space.npy").shape == (1, 2, *SHAPE)


def test_a_base_model_of_other_words_or_sizes_is_refused(latents, tmp_path):
    path, _ = latents
    args = settings_of(["--algo=nrg", f"--data={path}", f"--cache={tmp_path / 'cache'}"])
    with pytest.raises(
        BadInput, match=r"has shape \(5, 4, 6, 8\); the model takes \(3, 8, 32, 32\)"
    ):
        tasks.TASKS["nrg"](args, torch.device("cpu"))


def test_a_size_of_its_own(tmp_path, monkeypatch, capsys):
    """Height before width; one number for both; the toy renders squares alone."""
    assert settings_of(["--algo=reward", "--size=32x56"]).size == (32, 56)
    assert ModelConfig(size=(32, 56)).video_shape == (3, 8, 32, 56) and ModelConfig(
        size=(32, 56)
    ).grid == (4, 4, 7)
    assert ModelConfig(size=[16, 16]) == ModelConfig(size=16)
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--algo=pretrain", "--size=32x56", f"--out={tmp_path / 'run'}"]
    )
    with pytest.raises(BadInput, match="clips of 32x56 need --data"):
        train.main()


def test_latents_of_wan_take_a_step(tmp_path):
    """16 x T x 60 x 104, those of a clip of 480 x 832."""
    np.save(
        tmp_path / "shard.npy",
        np.random.default_rng(0).standard_normal((4, 16, 2, 60, 104)).astype(np.float16),
    )
    rows = [
        Pair(f"shard.npy:{i}", f"shard.npy:{i + 1}", PROMPTS[i], (1, 0, -1), 2.0, 4.0, 2.0, 4.0)
        for i in (0, 2)
    ]
    write_pairs(rows, tmp_path / "pairs.csv")
    flags = [
        "--preset=base",
        "--steps=1",
        "--batch=1",
        f"--data={tmp_path / 'pairs.csv'}",
        f"--out={tmp_path / 'run'}",
    ]

    def run():
        narrow = replace(forked.model.PRESETS["base"], dim=32, depth=2, heads=2)
        forked.model.PRESETS["base"] = narrow
        command("--algo=pretrain", *flags)

    log = tmp_path / "log"
    assert ended(fork(run, output=log)) == 0, log.read_text()
    assert load_velocity(tmp_path / "run" / "last.pt")[0].config.video_shape == (16, 2, 60, 104)


def test_videos_are_cropped_to_the_size_and_sampled_in_it(tmp_path, monkeypatch):
    """Also with sliding tiles, adapters and guidance: the wide middle of the toy's squares."""
    export_toy.export(
        export_toy.arguments(["export", str(tmp_path / "toy"), "--pairs=8", "--generated=0"])
    )
    data = [f"--data={tmp_path / 'toy' / 'train.csv'}", f"--cache={tmp_path / 'cache'}"]
    files = [
        f"--init={tmp_path / 'pretrain' / 'last.pt'}",
        f"--reward={tmp_path / 'reward' / 'last.pt'}",
    ]
    log = tmp_path / "log"
    for algo, flags in {
        "pretrain": ["--size=16x24", "--attention=tile:2,1,3/1,1,1"],
        "reward": ["--size=16x24", f"--val={tmp_path / 'toy' / 'train.csv'}"],
        "nrg": [*files, "--read=1", f"--val={tmp_path / 'toy' / 'train.csv'}"],
        "dpo": [*files, "--lora-rank=2", "--freeze=1"],
    }.items():
        shared = [f"--algo={algo}", *data, "--steps=1", "--batch=2", f"--out={tmp_path / algo}"]
        assert ended(fork(command, *shared, *flags, output=log)) == 0, log.read_text()
    assert load_velocity(tmp_path / "dpo" / "last.pt")[0].config.size == (16, 24)
    flags = [
        f"--ckpt={tmp_path / 'dpo' / 'last.pt'}",
        f"--nrg-ckpt={tmp_path / 'nrg' / 'last.pt'}",
        "--nrg=1,1,1",
    ]
    flags += ["--n=1", "--steps=1", f"--out={tmp_path / 'samples'}"]
    monkeypatch.setattr("sys.argv", ["sample.py", *flags])
    sample.main()
    (gif,) = (tmp_path / "samples").glob("*.gif")
    # two rows of one clip, four times as large, with lines of 2 around each
    assert iio.imread(gif).shape == (8, 2 * (16 * 4 + 4), 24 * 4 + 4, 3)

"""The commands, as a user runs them: tiny runs, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import tiny_checkpoints, with_read

import evaluate
import sample
import train
from data import TOY_WORDS
from model import Block
from real_data import export_toy
from runtime import checkpoint, cli

ROOT = Path(__file__).parent.parent
WEIGHTS = checkpoint.WEIGHTS
GIF = "a-red-circle-moving-left.gif"


def short(algo, *flags):
    """The flags of a tiny training."""
    tiny = ("--steps=4", "--batch=2", "--pairs=8", "--eval-prompts=2", "--eval-pairs=20")
    flags = [f"--algo={algo}", *map(str, flags)]
    return with_read(flags, *tiny, "--device=cpu", "--generated=0")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script's main: (script, *flags) -> standard output, or error if it must fail."""

    def run(script, *flags, status=0):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        end = 0
        try:
            cli.run(script.main)
        except SystemExit as stop:
            end = stop.code
        out, error = capsys.readouterr()
        assert end == status, error
        return error if status else out

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must end with one line, which holds these words, and status 2."""

    def run(script, flags, *words):
        (line,) = command(script, *flags, status=2).strip().splitlines()
        assert all(word in line for word in words), line

    return run


def test_sampling_from_a_shell_is_reproducible_and_follows_its_flags(command, tmp_path):
    flags = ["--n", "1", "--steps", "4", "--device", "cpu"]
    shell = [sys.executable, ROOT / "sample.py", *flags, "--out", tmp_path / "shell"]
    ran = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0 and "VQ" in ran.stdout and "mean" in ran.stdout, ran.stderr
    assert (tmp_path / "shell" / GIF).with_suffix(".png").stat().st_size > 1000
    clips = [(tmp_path / "shell" / GIF).read_bytes()]
    prompt = ["--prompt", " A red  circle,\tmoving LEFT."]  # the same as the default
    for more in (prompt, ["--seed", 1], ["--steps", 5], ["--cfg", 1]):
        out = tmp_path / str(more[-1])
        command(sample, *flags, *more, "--out", out)
        clips.append(next(out.glob("*.gif")).read_bytes())
    assert clips[0] == clips[1] and clips[0][:3] == b"GIF" and len(set(clips)) == 4


def test_guided_clips_come_with_those_without(command, tmp_path):
    def scores(*flags):
        """{run: lines of scores}, and the pictures' bytes."""
        folder = tmp_path / " ".join(["run", *flags])
        prompt = ["--prompt", "a red circle moving left"]
        out = command(sample, "--n", 2, "--steps", 3, "--out", folder, *prompt, *flags)
        runs = {}
        for line in out.splitlines()[2:-1]:
            middle = next(row for row in (" mean ", " 0 ", " 1 ") if row in line)
            run, _, numbers = line.rpartition(middle)
            runs.setdefault(run.strip(), []).append(numbers)
        return runs, {path.suffix: path.read_bytes() for path in folder.iterdir()}

    plain, _ = scores()
    assert list(plain) == ["CFG 2"]
    for nothing in ("--nrg-scale=0", "--nrg-interval=0,0.1"):  # steps at t = 1, .89 and .67
        left, _ = scores("--nrg", "1,1,0.5", nothing)
        assert left == {"CFG 2": plain["CFG 2"], "CFG 2 NRG 1,1,0.5": plain["CFG 2"]}
    up, pictures = scores("--nrg", "1,1,0.5")
    down, others = scores("--nrg", "-1,0,2")
    assert up["CFG 2"] == down["CFG 2"] == plain["CFG 2"]
    assert len({*map(tuple, up.values()), *map(tuple, down.values())}) == 3
    assert pictures.keys() == {".gif", ".png"}
    assert all(pictures[kind] != others[kind] for kind in pictures)


OTHERS = [  # beside the shipped models, which take clips of (3, 8, 32, 32) and 8 of the toy's words
    ({"channels": 5}, "(5, 8, 32, 32"),
    ({"max_text": 9}, "9"),
    ({"words": [*TOY_WORDS[:-1], "away"]}, "words"),
]


def test_models_of_other_clips_or_words_are_refused(refused, tmp_path):
    out = ["--out", tmp_path / "out"]
    for sizes, difference in OTHERS:
        init, reward = tiny_checkpoints(tmp_path, **sizes)
        nrg = ["--ckpt", tmp_path / "velocity.pt", "--nrg", "1,1,1", *out]
        refused(sample, nrg, "--nrg-ckpt", "--ckpt", difference)
        refused(train, short("nrg", init, *out), "--reward", "--init", difference)
        refused(train, short("reward", "--generated", 1, init, *out), "--init", difference)
        if "max_text" not in sizes:
            for algo in ("sft", "dpo", "nft"):
                flags = short(algo, "--steps", 10, init, reward, *out)
                refused(train, flags, "give --data CSV")
    for algo in ("pretrain", "reward"):
        flags = short(algo, "--preset", "base", *out)
        refused(train, flags, "latents", "(16, 8, 32, 32)", "give --data CSV")
    assert not (tmp_path / "out").exists()


def test_compiling_without_a_compiler_is_one_line(command, monkeypatch, tmp_path):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    flags = short("sft", "--freeze=0", "--compile", f"--out={tmp_path}")
    error = command(train, *flags, status=2)
    line = error.splitlines()[-1]
    assert line.startswith("train.py: error: --compile: ") and "/nowhere/g++" in line
    assert "Traceback" not in error


def test_gradient_checkpointing_changes_no_bit_and_bfloat16_little(command, monkeypatch, tmp_path):
    models, first, calls = tiny_checkpoints(tmp_path), {}, []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: calls.append(1) or forward(*args))
    for way in ("--precision=float32", "--grad-checkpoint", "--precision=bfloat16"):
        flags = ["--steps", 1, "--freeze", 0, "--precision=float32", way, *models]
        out = command(train, *short("sft", *flags), "--out", tmp_path / way)
        first[way] = json.loads((tmp_path / way / "metrics.jsonl").read_text()) | {"n": len(calls)}
        assert f", {'bfloat16' if 'bf' in way else 'float32'} on cpu, 1 steps of 2" in out
    plain, checkpointed, rounded = first.values()
    n = plain.pop("n")
    assert checkpointed.pop("n") == 2 * n + 3  # three blocks run once more in backward
    assert checkpointed == plain and rounded["loss"] != plain["loss"]
    assert rounded["loss"] == pytest.approx(plain["loss"], rel=0.02)


def test_sliding_tiles_are_trained_saved_and_sampled(command, tmp_path):
    tiles = "tile:1,2,2/2,1,1"
    flags = short("sft", "--attention", tiles, *tiny_checkpoints(tmp_path))
    command(train, *flags, "--out", tmp_path)
    assert checkpoint.load_checkpoint(tmp_path / "last.pt")["config"]["attention"] == tiles
    flags = ["--ckpt", tmp_path / "last.pt", "--n", 1, "--steps", 2, "--out", tmp_path]
    clips = []
    for more in ([], ["--attention", tiles], ["--attention", "full"]):
        command(sample, *flags, *more)
        clips.append((tmp_path / GIF).read_bytes())
    assert clips[0] == clips[1] != clips[2]


def test_dpo_ends_with_a_table_and_pictures_and_starts_at_its_reference(command, tmp_path):
    text = command(train, "--help")
    assert "--beta" in text and "default: 100" in text and "--loss" not in text
    out = command(train, *short("dpo"), "--out", tmp_path)
    for words in ("base, true score", "dpo wins, oracle", "dpo wins, VideoReward", "metrics.jsonl"):
        assert words in out
    names = {path.name for path in tmp_path.iterdir()}
    assert {"base_above_dpo.gif", "base_above_dpo.png", "last.pt"} <= names
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["accuracy"] == 0.5


# ---------------------------------------------------------------------------------------------
# Bad input


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


NOT_SAFE = "not a checkpoint that can be read safely"


def bad_files():
    """[(content, words of its error)] of checkpoints."""
    state = checkpoint.load_checkpoint(WEIGHTS / "base.pt")
    whole, model, config = (WEIGHTS / "base.pt").read_bytes(), state["model"], state["config"]
    places = model["places"]
    return [
        (whole[: len(whole) // 2], NOT_SAFE),
        (state | {"step": Hostile()}, NOT_SAFE),
        (state | {"vocabulary": [1]}, NOT_SAFE),
        (state | {"format": 99}, "format 99"),
        (state | {"config": {**config, "depth": 10**9}}, "depth 1000000000 must be"),
        (state | {"config": {**config, "dim": 80}}, "numbers of shape"),
        (state | {"model": None}, "do not describe a VideoTransformer"),
        (state | {"model": {k: v for k, v in model.items() if k != "places"}}, "lacks tensor"),
        (state | {"model": {**model, "place": places}}, "unknown tensor 'place'"),
        (state | {"model": {**model, "places": places / 0}}, "'places' must hold finite"),
        (state | {"vocabulary": ["a"] * 1000}, "1000 words"),
    ]


def test_bad_checkpoints_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, out = tmp_path / "bad.pt", ["--out", tmp_path / "out"]
    refused(sample, ["--ckpt", path, *out], "no such checkpoint")
    for content, words in bad_files():
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        refused(sample, ["--ckpt", path, *out], words)
    refused(train, short("dpo", "--init", path, *out), words)
    reward = checkpoint.load_checkpoint(WEIGHTS / "reward.pt")
    reward["model"]["std"] = torch.zeros(3)
    checkpoint.save_checkpoint(path, reward)
    refused(train, short("dpo", "--reward", path, *out), "std is not positive")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


BAD_FLAGS = {
    sample: {
        "--prompt=a purple circle moving left": "'purple'",
        "--prompt=": "0 words",
        "--cfg=inf": "--cfg: inf: must be a finite number",
        "--device=abacus": "abacus",
        "--nrg=1,1": "argument --nrg: 1,1: must be three numbers",
        "--nrg=1,1,1 --nrg-interval=0,2": "--nrg-interval",
        f"--nrg=1,1,1 --nrg-ckpt={WEIGHTS / 'base.pt'}": "holds a velocity model",
        "--n=1 --steps=3 --cfg=1e38": "not finite",
    },
    train: {
        "--algo=ppo": "choose from",
        "--lr=-1": "argument --lr: -1: must be a positive number",
        f"--seed={2**45}": "--seed: 35184372088832: must be a whole number from 0 to 2147483647",
        "--label-dropout=2": "argument --label-dropout: 2: must be a number from 0 to 1",
        "--freeze=6": "0 to 5",
        "--resume": "no such checkpoint",
        "--speed=9": "--speed: no such flag",
        "--align=0,0,0": "at least one weight",
        "--attention=tile:1,3,2": "does not divide the grid of (2, 4, 4) tokens",
        "--algo=nrg --read=7": "--read 7: this base model has 6 blocks",
        "--data=pairs.csv": "pairs.csv: cannot be read",
        "--accum=3": "--batch 2: must be a multiple of 3",
        "--fsdp": "--fsdp: needs processes; start with torchrun",
        "--algo=rwr --beta=7": "--beta: read by --algo dpo, not by rwr",
        "--reference=round": "has no effect without --rounds",
        "--algo=nrg --target=labels --reward=x.pt": "--reward: has no effect",
        "--algo=reward --val=x.csv": "--val: has no effect without --data",
        "--algo=reward --data=x.csv --generated=0": "--generated: has no effect with --data",
        "--rounds=2 --generated=1": "--generated: has no effect with --rounds",
        "--rounds=2 --caption=1": "--caption: has no effect without --refresh",
    },
    export_toy: {"": "the following arguments are required: folder"},
    evaluate: {
        "everything": "choose from 'reward', 'align', 'beta'",
        "align --eval-prompts=0": "argument --eval-prompts: 0: must be a whole number from 1",
    },
}


@pytest.mark.parametrize("script", BAD_FLAGS)
def test_bad_flags_are_refused(refused, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    for text, words in BAD_FLAGS[script].items():
        flags = [text] if text.startswith("--prompt") else text.split()
        if script is train:
            flags = ["--batch=2", "--steps=2", *flags]
        refused(script, flags, words)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    work, within = ["--work", tmp_path / "work"], file / "x"
    refused(evaluate, ["unified", "--work", within], f"--work: cannot write to {within}")
    refused(evaluate, ["unified", *work, "--out", file], f"--out: cannot write to {file}")
    pretrain = short("pretrain")
    export = [*pretrain, "--out", tmp_path / "out", "--export", file / "x.pt"]
    refused(train, export, "--export: cannot write to")
    refused(train, [*pretrain, "--out", file], "cannot write")
    refused(sample, ["--n", "1", "--steps", "1", "--out", file], "cannot write")

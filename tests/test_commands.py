"""The commands, as a user runs them: tiny runs of everything, resuming, and bad input."""

import json
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forked import same, tiny_checkpoints, with_read
from test_resume import stop

import evaluate
import sample
import tasks
import train
from data import TOY_WORDS
from model import ModelConfig, VideoTransformer
from real_data import export_toy
from reward import RewardConfig, VideoReward
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
    """Runs a script's main: (script, *flags) -> exit status, standard output, standard error."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        try:
            cli.run(script.main)
            status = 0
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def done(command):
    """The same for a command that must succeed -> standard output."""

    def run(script, *flags):
        status, out, error = command(script, *flags)
        assert status == 0, error
        return out

    return run


@pytest.fixture
def refused(command):
    """The same for a command that must end with one line, which holds these words, and status 2."""

    def run(script, flags, *words):
        status, _, error = command(script, *flags)
        lines = error.strip().splitlines()
        assert status == 2 and len(lines) == 1, error
        assert all(word in lines[0] for word in words), error

    return run


# ---------------------------------------------------------------------------------------------


def test_sampling_from_a_shell_is_reproducible_and_follows_its_flags(done, tmp_path):
    flags = ["--n", "1", "--steps", "4", "--device", "cpu"]
    shell = [sys.executable, ROOT / "sample.py", *flags, "--out", tmp_path / "shell"]
    ran = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0 and "VQ" in ran.stdout and "mean" in ran.stdout, ran.stderr
    assert (tmp_path / "shell" / GIF).with_suffix(".png").stat().st_size > 1000
    clips = [(tmp_path / "shell" / GIF).read_bytes()]
    for more in ([], ["--seed", 1], ["--steps", 5], ["--cfg", 1]):
        done(sample, *flags, *more, "--out", tmp_path)
        clips.append((tmp_path / GIF).read_bytes())
    assert clips[0] == clips[1] and clips[0][:3] == b"GIF" and len(set(clips)) == 4


def test_guided_clips_come_with_those_without(done, tmp_path):
    done(train, *short("nrg"), "--out", tmp_path / "nrg")

    def scores(*flags):
        """{run: lines of scores}, and the pictures' bytes."""
        folder = tmp_path / " ".join(["run", *flags])
        places = ["--nrg-ckpt", tmp_path / "nrg" / "last.pt", "--out", folder]
        places += ["--prompt", "a red circle moving left"]
        out = done(sample, "--n", 2, "--steps", 3, *places, *flags)
        runs = {}
        for line in out.splitlines()[2:-1]:
            middle = next(row for row in (" mean ", " 0 ", " 1 ") if row in line)
            run, _, numbers = line.rpartition(middle)
            runs.setdefault(run.strip(), []).append(numbers)
        return runs, {path.suffix: path.read_bytes() for path in folder.iterdir()}

    plain, _ = scores()
    assert list(plain) == ["CFG 2"]
    none, _ = scores("--nrg", "0,0,0")
    assert none == {"CFG 2": plain["CFG 2"], "CFG 2 NRG 0,0,0": plain["CFG 2"]}
    for nothing in ("--nrg-scale=0", "--nrg-interval=0,0.1"):  # steps at t = 1, .89 and .67
        left, _ = scores("--nrg", "1,1,0.5", nothing)
        assert left["CFG 2 NRG 1,1,0.5"] == plain["CFG 2"]
    up, pictures = scores("--nrg", "1,1,0.5")
    down, others = scores("--nrg", "-1,0,2")
    assert up["CFG 2"] == down["CFG 2"] == plain["CFG 2"]
    assert len({*map(tuple, up.values()), *map(tuple, down.values())}) == 3
    assert pictures.keys() == {".gif", ".png"}
    assert all(pictures[kind] != others[kind] for kind in pictures)


def save_models(folder, words=TOY_WORDS, **sizes):
    """Writes velocity.pt and reward.pt, tiny and untrained, of these sizes and words."""
    sizes = {"dim": 24, "depth": 3, "heads": 2, "vocab": len(words), **sizes}
    velocity, reward = VideoTransformer(ModelConfig(**sizes)), VideoReward(RewardConfig(**sizes))
    for kind, model in (("velocity", velocity), ("reward", reward)):
        state = {"kind": kind, "config": asdict(model.config), "vocabulary": words, "step": 0}
        checkpoint.save_checkpoint(folder / f"{kind}.pt", state | {"model": model.state_dict()})
    return ["--init", folder / "velocity.pt", "--reward", folder / "reward.pt"]


OTHERS = {  # beside the shipped models, which take clips of (3, 8, 32, 32) and 8 of the toy's words
    "latent": ({"channels": 5}, "(5, 8, 32, 32"),
    "short": ({"frames": 4}, "(3, 4, 32, 32"),
    "small": ({"size": 16}, "(3, 8, 16, 16"),
    "long prompts": ({"max_text": 9}, "9"),
    "words": ({"words": [*TOY_WORDS[:-1], "away"]}, "words"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_models_of_other_clips_or_words_are_refused(refused, tmp_path, other):
    sizes, difference = OTHERS[other]
    out = ["--out", tmp_path / "out"]
    init, velocity, *reward = save_models(tmp_path, **sizes)
    nrg = ["--ckpt", velocity, "--nrg", "1,1,1", *out]
    refused(sample, nrg, "--nrg-ckpt", "--ckpt", difference)
    refused(train, short("nrg", init, velocity, *out), "--reward", "--init", difference)
    refused(train, short("reward", "--generated", 1, init, velocity, *out), "--init", difference)
    if other in ("latent", "words"):
        for algo in ("sft", "dpo", "nft"):
            flags = short(algo, "--steps", 10, init, velocity, *reward, *out)
            refused(train, flags, "give --data CSV")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algo", ["pretrain", "reward"])
def test_a_preset_for_latents_needs_data(refused, tmp_path, algo):
    flags = [*short(algo, "--preset", "base"), "--out", tmp_path / "out"]
    refused(train, flags, "latents", "(16, 8, 32, 32)", "give --data CSV")


def test_case_punctuation_and_spaces_of_a_prompt_do_not_matter(done, tmp_path):
    flags = ["--n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path, "--prompt"]
    prompts = (
        "A red circle, moving LEFT.",
        " a  red\tcircle;moving left!",
        "a red circle moving left",
    )
    tables = [done(sample, *flags, prompt).splitlines()[1:-1] for prompt in prompts]
    assert tables[0] == tables[1] == tables[2]  # of true scores


@pytest.mark.parametrize("algo", [algo for algo in tasks.TASKS])
def test_a_stopped_run_resumes_bit_for_bit(command, done, monkeypatch, tmp_path, algo):
    flags, honest = with_read(short(algo), *tiny_checkpoints(tmp_path)), tasks.TASKS[algo]
    out = done(train, *flags, "--out", tmp_path / "whole")
    assert str(tmp_path / "whole" / "last.pt") in out.splitlines()[-1]

    def stops_in_step_1(settings, device):
        task = honest(settings, device)
        batch = task.batch

        def stops(step, rows):
            if step == 1:
                stop()
            return batch(step, rows)

        task.batch = stops
        return task

    flags += ["--out", str(tmp_path / "parts")]
    monkeypatch.setitem(tasks.TASKS, algo, stops_in_step_1)
    status, out, _ = command(train, *flags)
    assert status == 130 and "stopped after step 2" in out
    monkeypatch.setitem(tasks.TASKS, algo, honest)
    done(train, *flags, "--resume")
    runs = [tmp_path / name for name in ("whole", "parts")]
    assert same(*(checkpoint.load_checkpoint(run / "last.pt") for run in runs))
    logs = [(run / "metrics.jsonl").read_text() for run in runs]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [0, 1, 2, 3]


def test_resuming_with_other_settings_or_from_mere_weights_is_refused(done, refused, tmp_path):
    flags, last = short("pretrain", "--out", tmp_path), tmp_path / "last.pt"
    done(train, *flags)
    before = last.read_bytes()
    refused(train, [*flags, "--lr", "0.5", "--resume"], "--lr was 0.0025")
    assert last.read_bytes() == before
    last.write_bytes((WEIGHTS / "base.pt").read_bytes())
    refused(train, [*flags, "--resume"], "holds weights alone")


def test_compiling_without_a_compiler_is_one_line(command, monkeypatch, tmp_path):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    status, _, error = command(train, *short("sft", "--freeze=0", "--compile", f"--out={tmp_path}"))
    line = error.splitlines()[-1]
    assert status == 2 and "Traceback" not in error, error
    assert line.startswith("train.py: error: --compile: ") and "/nowhere/g++" in line


def first_log(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_gradient_checkpointing_changes_no_bit_and_bfloat16_little(done, tmp_path):
    models, logs, losses = tiny_checkpoints(tmp_path), [], []
    for name, more in (("plain", []), ("checkpointed", ["--grad-checkpoint"])):
        flags = short("dpo", "--steps", 2, *models, *more)
        done(train, *flags, "--precision", "float32", "--out", tmp_path / name)
        logs.append((tmp_path / name / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]
    for precision in ("float32", "bfloat16"):
        flags = short("sft", "--steps", 1, "--precision", precision, *models)
        out = done(train, *flags, "--out", tmp_path / precision)
        assert f", {precision} on cpu, 1 steps" in out
        losses.append(first_log(tmp_path / precision)["loss"])
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_sliding_tiles_are_trained_saved_and_sampled(done, tmp_path):
    tiles = "tile:1,2,2/2,1,1"
    flags = short("sft", "--attention", tiles, *tiny_checkpoints(tmp_path))
    done(train, *flags, "--out", tmp_path)
    assert checkpoint.load_checkpoint(tmp_path / "last.pt")["config"]["attention"] == tiles
    flags = ["--ckpt", tmp_path / "last.pt", "--n", 1, "--steps", 2, "--out", tmp_path]
    clips = []
    for more in ([], ["--attention", tiles], ["--attention", "full"]):
        done(sample, *flags, *more)
        clips.append((tmp_path / GIF).read_bytes())
    assert clips[0] == clips[1] != clips[2]


def test_dpo_ends_with_a_table_and_pictures_and_its_result_can_be_sampled(done, tmp_path):
    out = done(train, *short("dpo"), "--out", tmp_path)
    for words in ("base, true score", "dpo wins, oracle", "dpo wins, VideoReward", "metrics.jsonl"):
        assert words in out
    names = {path.name for path in tmp_path.iterdir()}
    assert {"base_above_dpo.gif", "base_above_dpo.png", "last.pt"} <= names
    first = first_log(tmp_path)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["accuracy"] == 0.5
    flags = ["--n", 1, "--steps", 2, "--out", tmp_path / "s"]
    done(sample, "--ckpt", tmp_path / "last.pt", *flags)


def test_help_shows_the_flags_of_the_algorithm_with_their_defaults(done):
    dpo, reward = (done(train, "--algo", algo, "--help") for algo in ("dpo", "reward"))
    assert "--beta" in dpo and "default: 100" in dpo and "--loss" not in dpo
    assert "--loss" in reward and "default: btt" in reward and "--beta" not in reward


# ---------------------------------------------------------------------------------------------
# Bad input


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


NOT_SAFE, SHAPE = "not a checkpoint that can be read safely", "numbers of shape"
UNLIKE = "its config or its weights do not describe a VideoTransformer"


def bad_files():
    """{name: (content, words of its error)} of checkpoints that must be refused."""
    state = checkpoint.load_checkpoint(WEIGHTS / "base.pt")
    whole, model, config = (WEIGHTS / "base.pt").read_bytes(), state["model"], state["config"]
    lacks = dict(list(model.items())[1:])
    return {
        "empty": (b"", NOT_SAFE),
        "truncated": (whole[: len(whole) // 2], NOT_SAFE),
        "text": (b"not a checkpoint", NOT_SAFE),
        "hostile": (pickle.dumps(Hostile()), NOT_SAFE),
        "hostile zip": (state | {"step": Hostile()}, NOT_SAFE),
        "list": ([1, 2, 3], NOT_SAFE),
        "word": (state | {"vocabulary": [1]}, NOT_SAFE),
        "format": (state | {"format": 99}, "format 99"),
        "deep": (state | {"config": {**config, "depth": 10**9}}, "depth 1000000000 must be"),
        "words": (state | {"vocabulary": ["a"] * 1000}, "1000 words"),
        "number": (state | {"model": {**model, "places": 3}}, "'places' must hold finite"),
        "nan": (state | {"model": {**model, "places": model["places"] / 0}}, "must hold finite"),
        "shape": (state | {"config": {**config, "dim": 80}}, SHAPE),
        "config": (state | {"config": {"width": 3}}, UNLIKE),
        "none": (state | {"model": None}, UNLIKE),
        "tensor": (state | {"model": torch.ones(3)}, UNLIKE),
        "lacks": (state | {"model": lacks}, "lacks tensor"),
    }


def test_bad_checkpoints_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, out = tmp_path / "bad.pt", ["--out", tmp_path / "out"]
    refused(sample, ["--ckpt", path, *out], "no such checkpoint")
    for content, words in bad_files().values():
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        refused(sample, ["--ckpt", path, *out], words)
    refused(train, short("dpo", "--init", path, *out), words)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


BAD_FLAGS = {
    sample: {
        "--prompt=a purple circle moving left": "'purple'",
        "--prompt=": "0 words",
        "--prompt=a red circle": "direction",
        "--n=0": "argument --n: 0: must be a whole number from 1 to 4096",
        "--steps=0": "argument --steps: 0: must be a whole number from 1 to 1000000000",
        f"--seed={2**45}": "--seed",
        "--cfg=inf": "--cfg: inf: must be a finite number",
        f"--ckpt={WEIGHTS / 'reward.pt'}": "holds a reward model",
        "--device=abacus": "abacus",
        "--device=meta": "meta",
        "--nrg=1,1": "argument --nrg: 1,1: must be three numbers",
        "--nrg=1,1,1 --nrg-scale=inf": "argument --nrg-scale: inf: must be a finite number",
        "--nrg=1,1,1 --nrg-interval=0.9,0": "--nrg-interval",
        "--nrg=1,1,1 --nrg-interval=0,2": "--nrg-interval",
        f"--nrg=1,1,1 --nrg-ckpt={WEIGHTS / 'base.pt'}": "holds a velocity model",
        "--n=1 --steps=3 --nrg=1e39,0,0": "not finite",
        "--n=1 --steps=3 --nrg=1,0,0 --nrg-scale=1e38": "not finite",
        "--n=1 --steps=3 --cfg=1e38": "not finite",
    },
    train: {
        "--algo=ppo": "choose from",
        "--lr=-1": "argument --lr: -1: must be a positive number",
        "--lr=nan": "--lr",
        "--steps=0": "argument --steps: 0: must be a whole number from 1 to 1000000000",
        f"--seed={2**45}": "--seed: 35184372088832: must be a whole number from 0 to 2147483647",
        "--lora-rank=-1": "--lora-rank: -1: must be a whole number from 0",
        "--label-dropout=2": "argument --label-dropout: 2: must be a number from 0 to 1",
        "--freeze=6": "0 to 5",
        f"--reward={WEIGHTS / 'base.pt'}": "holds a velocity model",
        "--resume": "no such checkpoint",
        "--speed=9": "--speed: no such flag",
        "--align=0,0,0": "at least one weight",
        "--align=1,nan,1": "argument --align: 1,nan,1: must be three numbers",
        "--attention=tile:1,3,2": "does not divide the grid of (2, 4, 4) tokens",
        "--time-shift=0": "argument --time-shift: 0: must be a positive number",
        "--algo=nrg --read=7": "--read 7: this base model has 6 blocks",
        "--algo=nrg --target=truth": "argument --target: invalid choice: 'truth'",
        "--data=pairs.csv": "pairs.csv: cannot be read",
        "--accum=3": "--batch 2: must be a multiple of 3",
        "--fsdp": "--fsdp: needs processes; start with torchrun",
        # flags that the algorithm does not read, or not here
        "--algo=rwr --beta=7": "--beta: read by --algo dpo, not by rwr",
        "--algo=dpo --loss=bt": "--loss: read by --algo reward, not by dpo",
        "--algo=dpo --rounds=2 --nft-beta=1": "--nft-beta: read by --algo nft, not by dpo",
        "--algo=pretrain --init=x.pt": "not by pretrain",
        "--reference=round": "has no effect without --rounds",
        "--algo=nrg --target=labels --reward=x.pt": "--reward: has no effect",
        "--algo=reward --val=x.csv": "--val: has no effect without --data",
        "--algo=reward --data=x.csv --generated=0": "--generated: has no effect with --data",
        "--skip-bad": "--skip-bad: has no effect without --data",
        "--rounds=2 --generated=1": "--generated: has no effect with --rounds",
        "--rounds=2 --caption=1": "--caption: has no effect without --refresh",
        "--flops=1": "--flops: has no effect without --plan",
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
            flags = ["--batch=2", *flags]
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

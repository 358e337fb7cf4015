"""The commands, as a user runs them: tiny runs of everything, resuming to the same bits, and bad input."""

import json
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forked import same, with_read

import evaluate
import sample
import tasks
import train
import world
from data import TOY_WORDS
from model import ModelConfig, VideoTransformer
from real_data import export_toy
from reward import RewardConfig, VideoReward
from runtime import checkpoint, cli

ROOT = Path(__file__).parent.parent


def short(algo, *flags):
    """The flags of a tiny training."""
    tiny = (
        "--steps=5",
        "--batch=2",
        "--eval-prompts=4",
        "--eval-pairs=20",
        "--device=cpu",
        "--generated=0",
    )
    return with_read([f"--algo={algo}", *map(str, flags)], *tiny)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script's main in this process: (script, *flags) -> exit status, standard output, standard error."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        try:
            cli.run(script.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# ---------------------------------------------------------------------------------------------


def test_sampling_on_shipped_weights_from_a_shell(tmp_path):
    flags = ["--prompt", "a red circle moving left", "--n", "2", "--seed", "3"]
    made = []
    for name in ("one", "two"):
        shell = [sys.executable, ROOT / "sample.py", *flags, "--out", tmp_path / name]
        done = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "VQ" in done.stdout and "mean" in done.stdout
        made.append((tmp_path / name / "a-red-circle-moving-left.gif").read_bytes())
        assert (tmp_path / name / "a-red-circle-moving-left.png").stat().st_size > 1000
    assert made[0] == made[1] and made[0][:3] == b"GIF"


def test_sampling_flags_change_the_clip(command, tmp_path):
    def gif(name, *flags):
        status, _, error = command(sample, "--n", 1, "--steps", 4, "--out", tmp_path / name, *flags)
        assert status == 0, error
        return (tmp_path / name / "a-red-circle-moving-left.gif").read_bytes()

    plain = gif("plain")
    assert gif("again") == plain
    assert (
        len({plain, gif("seed", "--seed", 1), gif("steps", "--steps", 5), gif("cfg", "--cfg", 1)})
        == 4
    )


def test_guided_clips_come_with_those_without(command, tmp_path):
    status, _, error = command(train, *short("nrg"), "--out", tmp_path / "nrg")
    assert status == 0, error

    def scores(*flags):
        """{run: lines of scores}, and the pictures' bytes."""
        folder = tmp_path / " ".join(["run", *flags])
        flags = [
            "--n",
            2,
            "--steps",
            3,
            "--nrg-ckpt",
            tmp_path / "nrg" / "last.pt",
            "--out",
            folder,
            *flags,
        ]
        status, out, error = command(sample, *flags)
        assert status == 0, error
        runs = {}
        for line in out.splitlines()[2:-1]:
            run, _, numbers = line.rpartition(
                next(row for row in (" mean ", " 0 ", " 1 ") if row in line)
            )
            runs.setdefault(run.strip(), []).append(numbers)
        return runs, {path.suffix: path.read_bytes() for path in folder.iterdir()}

    plain, _ = scores()
    assert list(plain) == ["CFG 2"]
    none, _ = scores("--nrg", "0,0,0")
    assert (
        list(none) == ["CFG 2", "CFG 2 NRG 0,0,0"]
        and len({*map(tuple, none.values()), *map(tuple, plain.values())}) == 1
    )
    for nothing in (
        "--nrg-scale=0",
        "--nrg-eps=1e9",
        "--nrg-interval=0,0.1",
    ):  # steps at t = 1, .89 and .67
        left, _ = scores("--nrg", "1,1,0.5", nothing)
        assert left["CFG 2 NRG 1,1,0.5"] == plain["CFG 2"]
    up, pictures = scores("--nrg", "1,1,0.5")
    down, others = scores("--nrg", "-1,0,2")
    assert up["CFG 2"] == down["CFG 2"] == plain["CFG 2"]
    assert len({*map(tuple, up.values()), *map(tuple, down.values())}) == 3
    assert pictures.keys() == {".gif", ".png"} and all(
        pictures[kind] != others[kind] for kind in pictures
    )
    compared, _ = scores("--nrg", "1,1,0.5", "--compare")
    assert (
        list(compared) == ["CFG 1", "CFG 2", "CFG 2 NRG 1,1,0.5"]
        and compared["CFG 2"] == plain["CFG 2"]
    )


def save_models(folder, words=TOY_WORDS, **sizes):
    """Writes velocity.pt and reward.pt, tiny and untrained, of these sizes and words."""
    sizes = {"dim": 24, "depth": 3, "heads": 2, "vocab": len(words), **sizes}
    folder.mkdir()
    for kind, model in {
        "velocity": VideoTransformer(ModelConfig(**sizes)),
        "reward": VideoReward(RewardConfig(**sizes)),
    }.items():
        state = {"kind": kind, "config": asdict(model.config), "vocabulary": words, "step": 0}
        checkpoint.save_checkpoint(folder / f"{kind}.pt", state | {"model": model.state_dict()})
    return ["--init", folder / "velocity.pt", "--reward", folder / "reward.pt"]


OTHERS = {
    "latent": ({"channels": 5}, "(5, 8, 32, 32)"),
    "short": ({"frames": 4}, "(3, 4, 32, 32)"),
    "small": ({"size": 16}, "(3, 8, 16, 16)"),
    "long prompts": ({"max_text": 9}, "9"),
    "words": ({"words": [*TOY_WORDS[:-1], "away"]}, "words"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_models_of_other_clips_or_words_are_refused_in_one_line(command, tmp_path, other):
    """Beside the shipped ones, which take clips of (3, 8, 32, 32) and 8 of the toy's words."""
    sizes, difference = OTHERS[other]
    init, velocity, *_ = save_models(tmp_path / "models", **sizes)
    out = ["--out", tmp_path / "out"]
    status, _, error = command(sample, "--ckpt", velocity, "--nrg", "1,1,1", *out)
    refused(status, error, "--nrg-ckpt", "--ckpt", difference)
    status, _, error = command(train, *short("nrg", init, velocity, *out))
    refused(status, error, "--reward", "--init", difference)
    status, _, error = command(train, *short("reward", "--generated", 1, init, velocity, *out))
    refused(status, error, "--init", difference)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("algo", ["nrg", "sft", "rwr", "dpo", "nft"])
def test_latents_and_other_words_need_data(command, tmp_path, algo):
    for name in ("latent", "words"):
        models = save_models(tmp_path / name, **OTHERS[name][0])
        flags = short(algo, "--steps", 10, *models, "--out", tmp_path / "out")
        status, _, error = command(train, *flags)
        refused(status, error, "give --data CSV")


@pytest.mark.parametrize("algo", ["pretrain", "reward"])
def test_a_preset_for_latents_needs_data(command, tmp_path, algo):
    status, _, error = command(train, *short(algo, "--preset", "base"), "--out", tmp_path / "out")
    refused(status, error, "latents", "(16, 8, 32, 32)", "give --data CSV")


PROMPTS = "A red circle, moving LEFT.", " a  red\tcircle;moving left!", "a (red) circle moving left"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_case_punctuation_and_spaces_of_a_prompt_do_not_matter(command, tmp_path, prompt):
    flags = ["--n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path]
    status, out, _ = command(sample, *flags, "--prompt", prompt)
    plain_status, plain, _ = command(sample, *flags, "--prompt", "a red circle moving left")
    assert status == plain_status == 0
    assert out.splitlines()[1:-1] == plain.splitlines()[1:-1]  # the same true scores
    assert world.prompt_attributes([prompt]).tolist() == [[0, 0, 0]]  # red, circle, left


@pytest.mark.parametrize(
    "algo", [algo for algo in tasks.TASKS if algo != "nft"]
)  # rounds: test_online.py
def test_a_stopped_run_resumes_to_the_same_bits(command, monkeypatch, tmp_path, algo):
    own = {"reward": ["--pairs", 40], "nft": ["--rounds", 1, "--clips", 1]}
    flags = short(algo, *own.get(algo, []))
    status, out, error = command(train, *flags, "--out", tmp_path / "whole")
    assert status == 0, error
    assert str(tmp_path / "whole" / "last.pt") in out.splitlines()[-1]

    honest = tasks.TASKS[algo]

    def stops_in_step_2(args, device):
        task = honest(args, device)
        batch = task.batch

        def stops(step, rows):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            return batch(step, rows)

        task.batch = stops
        return task

    monkeypatch.setitem(tasks.TASKS, algo, stops_in_step_2)
    status, out, _ = command(train, *flags, "--out", tmp_path / "parts")
    assert status == 130 and "stopped after step 3" in out
    assert checkpoint.load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 3
    monkeypatch.setitem(tasks.TASKS, algo, honest)
    status, _, error = command(train, *flags, "--out", tmp_path / "parts", "--resume")
    assert status == 0, error

    whole, parts = (
        checkpoint.load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")
    )
    assert same(whole, parts)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and [json.loads(line)["step"] for line in logs[0].splitlines()] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert not list(tmp_path.rglob("*.tmp"))


def test_compiling_without_a_compiler_is_one_line(command, monkeypatch, tmp_path):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    flags = short("sft", "--pairs=4", "--freeze=0", "--compile", f"--out={tmp_path / 'out'}")
    status, _, error = command(train, *flags)
    assert status == 2 and "Traceback" not in error, error
    line = error.splitlines()[-1]
    assert (
        line.startswith("train.py: error: --compile: ")
        and "/nowhere/g++" in line
        and "leave the flag out" in line
    )


def test_checkpointed_blocks_train_to_the_same_bits(command, tmp_path):
    flags = short("dpo", "--steps", 2)
    for name, more in (("kept", []), ("remade", ["--grad-checkpoint"])):
        status, _, error = command(train, *flags, *more, "--out", tmp_path / name)
        assert status == 0, error
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("kept", "remade")]
    assert logs[0] == logs[1]


def test_bfloat16_is_said_and_near_float32(command, tmp_path):
    losses = []
    for precision in ("float32", "bfloat16"):
        flags = short("sft", "--steps", 2, "--precision", precision)
        status, out, error = command(train, *flags, "--out", tmp_path / precision)
        assert status == 0, error
        assert f", {precision} on cpu, 2 steps" in out
        losses.append(
            json.loads((tmp_path / precision / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        )
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_sliding_tiles_are_trained_kept_and_sampled(command, tmp_path):
    tiles = "tile:1,2,2/2,1,1"
    status, _, error = command(train, *short("sft"), "--attention", tiles, "--out", tmp_path)
    assert status == 0, error
    assert checkpoint.load_checkpoint(tmp_path / "last.pt")["config"]["attention"] == tiles
    flags = ["--ckpt", tmp_path / "last.pt", "--n", 1, "--steps", 2, "--out", tmp_path]
    tables = []
    for more in ([], ["--attention", tiles], ["--attention", "full"]):
        status, out, error = command(sample, *flags, *more)
        assert status == 0, error
        tables.append((tmp_path / "a-red-circle-moving-left.png").read_bytes())
    assert tables[0] == tables[1] != tables[2]


def test_dpo_ends_with_a_table_and_pictures_and_its_result_can_be_sampled(command, tmp_path):
    status, out, error = command(train, *short("dpo"), "--out", tmp_path)
    assert status == 0, error
    for words in ("base, true score", "dpo wins, oracle", "dpo wins, VideoReward", "metrics.jsonl"):
        assert words in out
    assert {"base_above_dpo.gif", "base_above_dpo.png", "last.pt"} <= {
        path.name for path in tmp_path.iterdir()
    }
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["accuracy"] == 0.5
    assert (
        command(
            sample, "--ckpt", tmp_path / "last.pt", "--n", 1, "--steps", 2, "--out", tmp_path / "s"
        )[0]
        == 0
    )


def test_help_names_every_default(command):
    status, out, _ = command(train, "--help")
    assert status == 0
    assert all(
        f"{algo} {values['steps']}" in " ".join(out.split())
        for algo, values in tasks.DEFAULTS.items()
    )


# ---------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def bad_files(folder):
    """Checkpoints that must be refused, by name."""
    state = checkpoint.load_checkpoint(checkpoint.WEIGHTS / "base.pt")
    whole = (checkpoint.WEIGHTS / "base.pt").read_bytes()
    (folder / "empty.pt").write_bytes(b"")
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({**state, "step": Hostile()}, folder / "hostile zip.pt")
    torch.save({**state, "config": {**state["config"], "depth": 10**9}}, folder / "deep.pt")
    torch.save({**state, "vocabulary": ["a"] * 1000}, folder / "words.pt")
    torch.save({**state, "model": {**state["model"], "places": 3}}, folder / "number.pt")
    wide = {**state["model"], "places": torch.zeros(1, 1).expand(state["model"]["places"].shape)}
    torch.save({**state, "model": wide}, folder / "expanded.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({**state, "format": 99}, folder / "format.pt")
    torch.save({**state, "config": {**state["config"], "dim": 80}}, folder / "shape.pt")
    torch.save({**state, "config": {"width": 3}}, folder / "config.pt")
    torch.save({**state, "model": None}, folder / "none.pt")
    torch.save({**state, "model": torch.ones(3)}, folder / "tensor.pt")
    torch.save({**state, "ema": torch.ones(3)}, folder / "ema.pt")
    weights = dict(list(state["model"].items())[1:])
    torch.save({**state, "model": weights}, folder / "lacks.pt")


CHECKPOINTS = {
    "nowhere.pt": "no such checkpoint",
    "empty.pt": "not a checkpoint",
    "truncated.pt": "not a checkpoint",
    "text.pt": "not a checkpoint",
    "hostile.pt": "not a checkpoint",
    "hostile zip.pt": "not a checkpoint",
    "deep.pt": "depth 1000000000 must be a whole number from 1 to 512",
    "words.pt": "1000 words",
    "number.pt": "'places' is no tensor",
    "expanded.pt": "tensor 'places' has another shape",
    "list.pt": "not a checkpoint",
    "format.pt": "format 99",
    "shape.pt": "another shape",
    "config.pt": "its config or its weights do not describe a VideoTransformer",
    "none.pt": "its config or its weights do not describe a VideoTransformer",
    "tensor.pt": "its config or its weights do not describe a VideoTransformer",
    "ema.pt": "its config or its weights do not describe a VideoTransformer",
    "lacks.pt": "lacks tensor",
}


def refused(status, error, *words):
    lines = error.strip().splitlines()
    assert status == 2 and len(lines) == 1 and all(word in lines[0] for word in words), error


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints_are_refused_in_one_line(command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    status, _, error = command(sample, "--ckpt", tmp_path / name, "--out", tmp_path / "out")
    refused(status, error, CHECKPOINTS[name])
    status, _, error = command(
        train, *short("dpo"), "--init", tmp_path / name, "--out", tmp_path / "out"
    )
    refused(status, error, CHECKPOINTS[name])
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "a purple circle moving left"], "'purple'"),
        (["--prompt", "a purple circle moving left"], "red, yellow, green, cyan, blue, magenta"),
        (["--prompt", ""], "0 words"),
        (["--prompt", "a red circle"], "direction"),
        (["--n", "0"], "argument --n: 0: must be a whole number from 1 to 4096"),
        (["--steps", "0"], "argument --steps: 0: must be a whole number from 1 to 1000000000"),
        (["--ckpt", checkpoint.WEIGHTS / "reward.pt"], "holds a reward model"),
        (["--device", "abacus"], "abacus"),
        (
            ["--nrg", "1,1"],
            "argument --nrg: 1,1: must be three numbers with commas between, for example 1,1,0.5",
        ),
        (["--nrg", "up"], "argument --nrg: up: must be three numbers with commas between"),
        (
            ["--nrg", "1,1,1", "--nrg-eps", "-0.1"],
            "argument --nrg-eps: -0.1: must be 0 or a positive number",
        ),
        (
            ["--nrg", "1,1,1", "--nrg-scale", "inf"],
            "argument --nrg-scale: inf: must be a finite number",
        ),
        (
            ["--nrg", "1,1,1", "--nrg-interval", "0.5"],
            "argument --nrg-interval: 0.5: must be two numbers from 0 to 1",
        ),
        (
            ["--nrg", "1,1,1", "--nrg-ckpt", checkpoint.WEIGHTS / "base.pt"],
            "holds a velocity model",
        ),
    ],
)
def test_bad_sampling_flags_are_refused_in_one_line(command, tmp_path, flags, words):
    status, _, error = command(sample, *flags, "--out", tmp_path / "out")
    refused(status, error, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--algo", "ppo"], "choose from 'pretrain', 'reward', 'nrg', 'sft', 'rwr', 'dpo', 'nft'"),
        (["--lr", "-1"], "argument --lr: -1: must be a positive number"),
        (["--steps", "0"], "argument --steps: 0: must be a whole number from 1 to 1000000000"),
        (["--label-dropout", "2"], "argument --label-dropout: 2: must be a number from 0 to 1"),
        (["--freeze", "6"], "0 to 5"),
        (["--reward", checkpoint.WEIGHTS / "base.pt"], "holds a velocity model"),
        (["--resume"], "no such checkpoint"),
        (["--speed", "9"], "--speed"),
        (["--align", "0,0,0"], "at least one weight"),
        (["--attention", "tile:1,3,2"], "does not divide the grid of (2, 4, 4) tokens"),
        (["--align", "1,1"], "argument --align: 1,1: must be three numbers with commas between"),
        (
            ["--align", "1,nan,1"],
            "argument --align: 1,nan,1: must be three numbers with commas between",
        ),
        (
            ["--time-shift", "0"],
            "--time-shift 0: clean clips are for --algo nrg alone; give a positive number",
        ),
        (["--algo", "nrg", "--read", "7"], "--read 7: this base model has 6 blocks"),
        (["--algo", "nrg", "--target", "truth"], "argument --target: invalid choice: 'truth'"),
        (
            ["--algo", "reward", "--generated", "2"],
            "argument --generated: 2: must be a number from 0 to 1",
        ),
        (["--data", "pairs.csv"], "pairs.csv: cannot be read"),
        (["--accum", "3"], "--batch 2: must be a multiple of 3"),
        (["--fsdp"], "--fsdp: shards over the processes of torchrun"),
        (["--algo", "reward", "--data", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_bad_training_flags_are_refused_in_one_line(command, tmp_path, flags, words):
    status, _, error = command(train, "--batch=2", *flags, "--out", tmp_path / "out")
    refused(status, error, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--algo rwr --beta 7", "--beta: read by --algo dpo, not by rwr"),
        ("--algo sft --temperature 1", "--temperature: read by --algo rwr, not by sft"),
        ("--algo dpo --loss bt", "--loss: read by --algo reward, not by dpo"),
        ("--algo dpo --rounds 2 --nft-beta 1", "--nft-beta: read by --algo nft, not by dpo"),
        ("--algo dpo --kl 0", "--kl: read by --algo nft, not by dpo"),
        ("--preset small", "--preset: read by --algo pretrain, reward, not by dpo"),
        ("--algo nft --pairs 9", "--pairs: read by --algo reward, nrg, sft, rwr, dpo, not by nft"),
        ("--algo pretrain --init x.pt", "not by pretrain"),
        ("--algo reward --attention full", "not by reward"),
        ("--algo reward --time-shift 4", "not by reward"),
        ("--algo reward --eval-prompts 4", "not by reward"),
        (
            "--reference first",
            "--reference: has no effect here; --algo dpo reads it only with --rounds",
        ),
        ("--algo nrg --target labels --reward x.pt", "--reward: has no effect here"),
        (
            "--algo reward --val x.csv",
            "--val: has no effect here; --algo reward reads it only with --data",
        ),
        ("--algo reward --data x.csv --generated 0", "reads it only without --data"),
        ("--algo reward --generated 0 --init x.pt", "reads it only with --generated above 0"),
        (
            "--algo pretrain --data x.csv --eval-seed 3",
            "reads it only where there is a closing table",
        ),
        ("--skip-bad", "reads it only with --data"),
        ("--cache x", "reads it only with --data or --generated"),
        ("--rounds 2 --generated 1", "reads it only without --data and --rounds"),
        ("--rounds 2 --caption 1", "reads it only with --refresh"),
        ("--flops 1", "reads it only with --plan"),
    ],
)
def test_a_flag_that_the_training_does_not_read_is_refused(command, tmp_path, flags, words):
    status, _, error = command(train, *flags.split(), "--out", tmp_path / "out")
    refused(status, error, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (export_toy, ["export"], "needs a new folder"),
        (export_toy, ["table", "x"], "needs a new folder"),
        (
            export_toy,
            ["table", "--pairs", "0"],
            "argument --pairs: 0: must be a whole number from 1 to 1000000000",
        ),
        (
            export_toy,
            ["table", "--seed", "9" * 20],
            "--seed: 99999999999999999999: must be a whole number from 0",
        ),
        (evaluate, ["everything"], "choose from 'reward', 'align', 'beta'"),
        (
            evaluate,
            ["align", "--eval-prompts", "0"],
            "argument --eval-prompts: 0: must be a whole number from 1",
        ),
    ],
)
def test_bad_flags_of_other_commands_are_refused_in_one_line(
    command, tmp_path, monkeypatch, script, flags, words
):
    monkeypatch.chdir(tmp_path)
    status, _, error = command(script, *flags)
    refused(status, error, words)
    assert not list(tmp_path.iterdir())


def test_the_table_of_the_preference_data_from_a_shell(tmp_path):
    shell = [sys.executable, ROOT / "data.py", "table", "--pairs", "50", "--generated", "0"]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "## train: 50 pairs" in out and "## benchmark: 10 pairs" in out
    row = next(line for line in out.splitlines() if line.startswith("| VQ"))
    shares = [float(cell) for cell in row.split("|")[2:6]]
    assert (
        sum(shares[:3]) == pytest.approx(1, abs=0.002) and 0 < shares[3] <= 1
    )  # A, tie, B; unanimous
    counts = [
        int(line.split("|")[2])
        for line in out.splitlines()
        if line.startswith(("| early", "| modern"))
    ]
    assert sum(counts) == 2 * (50 + 10 + 10)  # every pair is in two generators' rows


def test_resuming_with_other_settings_or_from_mere_weights_is_refused(command, tmp_path):
    flags = short("pretrain", "--out", tmp_path)
    assert command(train, *flags)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    status, _, error = command(train, *flags, "--lr", "0.5", "--resume")
    refused(status, error, "--lr was 0.002")
    assert (tmp_path / "last.pt").read_bytes() == before
    (tmp_path / "last.pt").write_bytes((checkpoint.WEIGHTS / "base.pt").read_bytes())
    status, _, error = command(train, *flags, "--resume")
    refused(status, error, "without the optimiser")


def test_a_folder_that_cannot_be_written_is_named(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for flags in (
        ["--work", tmp_path / "file" / "x"],
        ["--work", tmp_path / "work", "--out", tmp_path / "file"],
    ):
        status, _, error = command(evaluate, "unified", *flags)
        refused(status, error, f"{flags[-2]}: cannot write to {flags[-1]}")
    pretrain = short("pretrain", "--out", tmp_path / "out")
    status, _, error = command(train, *pretrain, "--export", tmp_path / "file" / "x.pt")
    refused(status, error, "--export: cannot write to")
    status, _, error = command(train, *short("pretrain"), "--out", tmp_path / "file")
    refused(status, error, "cannot write")
    status, _, error = command(sample, "--n", "1", "--steps", "1", "--out", tmp_path / "file")
    refused(status, error, "cannot write")

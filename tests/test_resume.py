"""Bad days: a run is killed, the disk is full, the folder is taken, the numbers are not finite."""

import json
import os
import resource
import shutil
import signal
import time
from collections import namedtuple
from functools import partial

import pytest
import torch
from forked import command, ended, fork, same, tiny_checkpoints, weights

import tasks
from model import load_velocity
from nrg import load_noisy_reward
from online import rounds
from real_data import export_toy
from reward import load_reward
from runtime import checkpoint, distributed, resume
from runtime.cli import BadInput

RUN = ["--algo=pretrain", "--batch=2", "--steps=12", "--ema=0.9"]
DPO = ["--algo=dpo", "--batch=4", "--freeze=1", "--precision=float32", "--lr=1e-3"]


@pytest.fixture
def run(tmp_path):
    """Runs train.py, after prepare() in its process -> what it printed."""

    def run(*flags, status=0, prepare=None):
        def main():
            if prepare:
                prepare()
            command(f"--out={tmp_path / 'run'}", *flags)

        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        assert ended(fork(main, output=log)) == status, log.read_text()
        text = log.read_text()
        assert "Traceback" not in text and text.count("error:") == (status == 2), text
        return text

    return run


def before_call(module, name, number, action):
    """Has action(*args) done before the `number`-th call of module.name(*args)."""
    honest, calls = getattr(module, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action(*args)
        return honest(*args, **kwargs)

    setattr(module, name, patched)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(_, file):
    file.write(b"PK\3\4 the first part of a checkpoint")
    file.flush()
    kill()


def stop(*_):
    signal.raise_signal(signal.SIGINT)


# Moments around and in a save of every second step, and the step of the checkpoint that is left
MOMENTS = [
    ((json, "dumps", 5, kill), 4),
    ((resume, "save_checkpoint", 2, kill), 6),
    ((torch, "save", 2, kill_in_write), 8),
    ((os, "fsync", 2, kill), 10),
    ((os, "replace", 2, kill), 12),
]


def test_killed_at_any_moment_a_run_resumes_bit_for_bit(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begun = time.monotonic()
    run(*RUN, f"--out={whole}", "--save-every=1000")
    seconds = time.monotonic() - begun

    def part(moment):
        if moment:
            before_call(*moment)
        more = ["--resume"] if (parts / "last.pt").exists() else []
        command(*RUN, f"--out={parts}", "--save-every=2", *more)

    for moment, step in MOMENTS:
        assert ended(fork(part, moment)) == -signal.SIGKILL
        assert checkpoint.load_checkpoint(parts / "last.pt")["step"] == step
    shutil.rmtree(parts)
    child = fork(part, None)
    time.sleep(seconds / 4)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert ended(fork(part, None)) == 0
    assert same(*(torch.load(folder / "last.pt") for folder in (whole, parts)))
    logs = [(folder / "metrics.jsonl").read_text() for folder in (whole, parts)]
    steps = [json.loads(line)["step"] for line in logs[0].splitlines()]
    assert logs[0] == logs[1] and steps == list(range(12))
    assert not list(parts.glob("*.tmp"))


def test_the_log_is_cut_to_the_checkpoint_and_locked(run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    lines = '{"step": 0}\n{"step": 1}\n'
    (out / "metrics.jsonl").write_text(lines + '{"step": 2}\n{"st')  # killed in a write
    with resume.open_log(out, 2, 0) as write:
        write({"step": 2, "again": 1})
        assert "another run is writing there" in run(*RUN, status=2)
    assert (out / "metrics.jsonl").read_text() == lines + '{"step": 2, "again": 1}\n'


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run, tmp_path):
    flags, last = [*RUN, "--steps=2"], tmp_path / "run" / "last.pt"
    run(*flags)
    before = {path.name: path.read_bytes() for path in last.parent.iterdir()}
    assert "last.pt: a run is there already" in run(*flags, status=2)
    assert {path.name: path.read_bytes() for path in last.parent.iterdir()} == before
    state = torch.load(last)
    del state["training"]["exp_avg.places"]
    torch.save(state, last)
    assert "does not hold the state of this model's" in run(*flags, "--resume", status=2)
    last.write_bytes((checkpoint.WEIGHTS / "base.pt").read_bytes())
    assert "holds weights alone" in run(*flags, "--resume", status=2)


def test_too_little_room_is_told_before_the_first_step(run, tmp_path):
    # 89,000 parameters, their averages and Adam's two moments are 1.4 MB, in two files 2.8 MB
    def full():
        disk = namedtuple("disk", "total used free")
        shutil.disk_usage = lambda path: disk(10**9, 10**9 - 2 * 10**6, 2 * 10**6)

    assert "0.00 GB free" in run(*RUN, status=2, prepare=full)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def fill_disk(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def fill_disk_in_line(record):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # the error still finds room
    record["blank"] = " " * 10_000


FULL = {  # what fails: (the call before which the disk fills, what is printed, steps saved)
    "a checkpoint": ((resume, "save_checkpoint", 2, fill_disk), "last.pt: File too large", 3),
    "the log": ((json, "dumps", 5, fill_disk_in_line), "last.pt is the last good state", 3),
    "the last save": ((resume, "save_checkpoint", 5, fill_disk), "CFG 2: true score", 12),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(run, tmp_path, what):
    call, words, step = FULL[what]
    text = run(*RUN, "--save-every=3", status=2, prepare=partial(before_call, *call))
    assert "cannot write" in text and words in text
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == step
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_used(run, tmp_path):
    def spoil(task, *_):
        whole, steps = task.loss, iter(range(12))

        def loss(batch):
            value, logs = whole(batch)
            if next(steps) == 7:
                value = value + (value * 0).sqrt()  # 0, with the gradient of sqrt at 0
            return value, logs

        task.loss = loss

    prepare = partial(before_call, distributed, "wrap_model", 1, spoil)
    text = run(*RUN, "--save-every=3", "--seed=5", status=2, prepare=prepare)
    assert "at step 7 (--seed 5)" in text and "last.pt is the last good state" in text
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 6
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 7  # 0 to 6


def test_adapters_with_averaged_weights_can_be_sampled_and_resumed(run, tmp_path):
    last, models = tmp_path / "run" / "last.pt", tiny_checkpoints(tmp_path)
    flags = [*DPO, *models, "--lora-rank=2", "--ema=0.9", "--pairs=8", "--steps=3"]
    run(*flags)
    model, _ = load_velocity(last)
    state = checkpoint.load_checkpoint(last)
    base = checkpoint.load_checkpoint(tmp_path / "velocity.pt")["model"]
    name, training = "blocks.2.attn.qkv", state["training"]
    up, down = training[f"ema.{name}.up"], training[f"ema.{name}.down"]
    assert up.any() and not torch.equal(up, training[f"model.{name}.up"])
    merged = base[f"{name}.weight"] + 2 * up @ down  # alpha is twice the rank
    assert torch.allclose(model.blocks[2].attn.qkv.weight, merged, atol=1e-7)
    run(*flags, "--resume")
    assert same(checkpoint.load_checkpoint(last), state)


def test_what_changes_no_result_may_change_on_resume(run, tmp_path):
    flags = [*DPO, *tiny_checkpoints(tmp_path), "--pairs=16", "--steps=4"]
    run(*flags, f"--out={tmp_path / 'whole'}")
    text = run(*flags, status=130, prepare=partial(before_call, tasks, "take", 2, stop))
    assert "stopped after step 2" in text
    run(*flags, "--accum=2", "--grad-checkpoint", "--save-every=1", "--resume")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-6


def test_a_longer_run_goes_on_at_the_constant_rate_on_the_same_pairs(run, tmp_path):
    flags = [*DPO, *tiny_checkpoints(tmp_path)]
    run(*flags, "--steps=2")
    run(*flags, "--steps=5", "--resume")
    run(*flags, "--steps=5", "--pairs=8", f"--out={tmp_path / 'whole'}")  # 2 x 4
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "whole")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 5
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_change_that_changes_the_result_is_refused(run, tmp_path):
    rule = "a run can only get longer, after its warm-up, without --decay and --rounds"
    cases = {  # flags of a run, and then flags that it does not go on with
        (): {
            "--steps=1": f"--steps was 2, now 1, but {rule}",
            "--steps=100": rule,  # its warm-up takes 10
            "--precision=bfloat16": "--precision was float32",
            "--algo=sft": "--algo was dpo",
        },
        ("--decay=0.5",): {"--steps=4": rule},
        ("--rounds=2", "--clips=2"): {"--steps=4": rule},
    }

    def few_prompts():
        rounds.MOST_PROMPTS = 2

    for begun, changes in cases.items():
        flags = [*DPO, *tiny_checkpoints(tmp_path), "--steps=2", f"--out={tmp_path / str(begun)}"]
        run(*flags, *begun, prepare=few_prompts)
        for change, why in changes.items():
            assert why in run(*flags, *begun, change, "--resume", status=2)


def test_a_file_that_changed_since_the_run_began_is_named(run, tmp_path):
    models, toy = tiny_checkpoints(tmp_path), tmp_path / "toy"
    shutil.copy(tmp_path / "velocity.pt", tmp_path / "reference.pt")
    export_toy.export(export_toy.arguments([str(toy), "--pairs=6", "--generated=0"]))
    files = {"init": tmp_path / "velocity.pt", "reward": tmp_path / "reward.pt"}
    files |= {"reference": tmp_path / "reference.pt", "data": toy / "train.csv"}
    flags = [*DPO, "--batch=2", "--steps=1", *models, f"--cache={tmp_path / 'cache'}"]
    flags += [f"--reference={files['reference']}", f"--data={files['data']}"]
    run(*flags)
    for flag, path in files.items():
        before = path.read_bytes()
        if flag == "data":  # its rows in another order
            head, *rows = path.read_text().splitlines()
            path.write_text("\n".join([head, *rows[::-1], ""]))
        else:
            torch.save({**torch.load(path), "step": 1}, path)
        assert f"{path} (--{flag}) has changed since" in run(*flags, "--resume", status=2)
        path.write_bytes(before)


LOAD = {"reward": load_reward, "nrg": load_noisy_reward}


@pytest.mark.parametrize("algo", LOAD)
def test_a_reward_without_its_unit_is_refused_until_its_training_is_over(run, tmp_path, algo):
    init, _ = tiny_checkpoints(tmp_path)
    flags = [f"--algo={algo}", "--batch=2", "--steps=2", "--pairs=8"]
    flags += [init, "--read=1"] if algo == "nrg" else ["--generated=0"]
    run(*flags, status=130, prepare=partial(before_call, tasks, "take", 1, stop))
    with pytest.raises(BadInput, match="last.pt: its scores get their unit at the end"):
        LOAD[algo](tmp_path / "run" / "last.pt")
    run(*flags, "--resume")
    LOAD[algo](tmp_path / "run" / "last.pt")

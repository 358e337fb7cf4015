"""Bad days: a run is killed, the disk is full, the folder is taken, the numbers are not finite."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import namedtuple
from functools import partial

import pytest
import torch
from forked import command, ended, fork, same, tiny_checkpoints, weights

import sample
import tasks
from model import load_velocity
from online import rounds
from real_data import export_toy
from runtime import checkpoint, cli, distributed, resume
from runtime.cli import BadInput

RUN = ["--algo=pretrain", "--batch=2", "--steps=24", "--ema=0.9"]
DPO = ["--algo=dpo", "--batch=4", "--freeze=1", "--precision=float32", "--lr=1e-3"]


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


def allow_files_of(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Moments in and around a save: before the log's line, before the checkpoint, in its write, before
# it is on the disk, before it has its name.
MOMENTS = [
    *((json, "dumps", number, kill) for number in (1, 5)),
    *((resume, "save_checkpoint", number, kill) for number in (1, 2)),
    *((torch, "save", number, kill_in_write) for number in (1, 2)),
    *((os, "fsync", number, kill) for number in (1, 2)),
    *((os, "replace", number, kill) for number in (1, 2)),
]


def test_killed_at_any_moment_a_run_resumes_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begun = time.monotonic()
    assert ended(fork(command, *RUN, f"--out={whole}", "--save-every=1000")) == 0
    seconds = time.monotonic() - begun

    def run(moment):
        if moment:
            before_call(*moment)
        more = ["--resume"] if (parts / "last.pt").exists() else []
        command(*RUN, f"--out={parts}", "--save-every=3", *more)

    rng, reached, died = random.Random(0), 0, 0
    moments = [*MOMENTS, None, None, None]
    rng.shuffle(moments)
    for moment in moments:
        child = fork(run, moment)
        if not moment:
            time.sleep(rng.uniform(0, seconds / 2))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == 0:  # the run came to its end: once more from the start
            assert same(*(torch.load(folder / "last.pt") for folder in (whole, parts)))
            shutil.rmtree(parts)
            reached = 0
            continue
        assert status == -signal.SIGKILL
        died += 1
        if (parts / "last.pt").exists():
            step = checkpoint.load_checkpoint(parts / "last.pt")["step"]
            assert step >= reached
            reached = step
    assert died >= len(MOMENTS) - 2
    assert ended(fork(run, None)) == 0
    assert same(*(torch.load(folder / "last.pt") for folder in (whole, parts)))
    logs = [(folder / "metrics.jsonl").read_text() for folder in (whole, parts)]
    steps = [json.loads(line)["step"] for line in logs[0].splitlines()]
    assert logs[0] == logs[1] and steps == list(range(24))
    assert not list(parts.glob("*.tmp"))


def open_log(out, start):
    return resume.open_log(out, start, 0)


def test_the_log_is_cut_to_the_checkpoint_and_locked(refused, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    lines = '{"step": 0}\n{"step": 1}\n'
    (out / "metrics.jsonl").write_text(lines + '{"step": 2}\n{"st')  # killed in a write
    with open_log(out, 2) as write:
        write({"step": 2, "again": 1})
        assert "another run is writing there" in refused()
    assert (out / "metrics.jsonl").read_text() == lines + '{"step": 2, "again": 1}\n'


@pytest.fixture
def refused(tmp_path):
    """Runs train.py, which must end with one line and status 2 -> the line."""

    def run(*flags, prepare=None, first=RUN):
        def main():
            if prepare:
                prepare()
            command(*first, f"--out={tmp_path / 'run'}", *flags)

        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        status, lines = ended(fork(main, output=log)), log.read_text().splitlines()
        errors = [line for line in lines if "error:" in line]
        assert status == 2 and len(errors) == 1 and "Traceback" not in log.read_text(), lines
        return errors[0]

    return run


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(refused, tmp_path):
    out = tmp_path / "run"
    assert ended(fork(command, *RUN, f"--out={out}", "--steps=2")) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "last.pt: a run is there already" in refused()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_too_little_room_is_told_before_the_first_step(refused, tmp_path):
    # 89,000 parameters, their averages and Adam's two moments are 1.4 MB, in two files 2.8 MB
    def full():
        disk = namedtuple("disk", "total used free")
        shutil.disk_usage = lambda path: disk(10**9, 10**9 - 2 * 10**6, 2 * 10**6)

    assert "0.00 GB free" in refused(prepare=full)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def fill_disk(*_):
    allow_files_of(100_000)


def fill_disk_in_line(record):
    allow_files_of(4000)  # the error still finds room
    record["blank"] = " " * 10_000


FULL = {  # what fails: (the call before which the disk fills, what is printed, steps saved)
    "a checkpoint": ((resume, "save_checkpoint", 2, fill_disk), "last.pt: File too large", 3),
    "the log": ((json, "dumps", 5, fill_disk_in_line), "last.pt is the last good state", 3),
    "the last save": ((resume, "save_run", 9, fill_disk), "CFG 2: true score", 24),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(refused, tmp_path, what):
    call, words, step = FULL[what]
    assert "cannot write" in refused("--save-every=3", prepare=partial(before_call, *call))
    assert words in (tmp_path / "log").read_text()
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == step
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_adapters_with_averaged_weights_can_be_sampled_and_resumed(tmp_path):
    out, models = tmp_path / "run", tiny_checkpoints(tmp_path)
    flags = [*DPO, *models, "--lora-rank=2", "--ema=0.9", "--pairs=8", "--steps=3", f"--out={out}"]
    assert ended(fork(command, *flags)) == 0
    model, _ = load_velocity(out / "last.pt")
    state = checkpoint.load_checkpoint(out / "last.pt")
    base = checkpoint.load_checkpoint(tmp_path / "velocity.pt")["model"]
    name, training = "blocks.2.attn.qkv", state["training"]
    up, down = training[f"ema.{name}.up"], training[f"ema.{name}.down"]
    assert up.any() and not torch.equal(up, training[f"model.{name}.up"])
    merged = base[f"{name}.weight"] + 2 * up @ down  # alpha is twice the rank
    assert torch.allclose(model.blocks[2].attn.qkv.weight, merged, atol=1e-7)
    assert ended(fork(command, *flags, "--resume")) == 0
    assert same(checkpoint.load_checkpoint(out / "last.pt"), state)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_before_they_are_used(refused, tmp_path, what):
    def spoil(task, *_):
        whole, calls = task.loss, []

        def loss(batch):
            value, logs = whole(batch)
            calls.append(1)
            if len(calls) == 8 and what == "loss":
                value = value * float("nan")
            if len(calls) == 8 and what == "gradient":
                value = value + (value * 0).sqrt()  # 0, with the gradient of sqrt at 0
            return value, logs

        task.loss = loss

    prepare = partial(before_call, distributed, "wrap_model", 1, spoil)
    line = refused("--save-every=3", "--seed=5", prepare=prepare)
    assert "at step 7 (--seed 5)" in line and "last.pt is the last good state" in line
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 6
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 7  # 0 to 6


def test_a_checkpoint_of_another_model_is_not_restored():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    names = dict(model.named_parameters())
    tensors = resume.run_tensors(names, {}, optimizer)
    good = {name: value + 1 for name, value in tensors.items()}
    assert resume.restore({"step": 4, "training": good}, tensors) == 4
    assert torch.equal(names["bias"], good["model.bias"])
    assert torch.equal(optimizer.state[names["weight"]]["exp_avg"], torch.ones(2, 3))
    lacking = {name: value for name, value in good.items() if name != "step.bias"}
    other = good | {"exp_avg.weight": torch.zeros(4, 5)}
    for training in (lacking, other):
        with pytest.raises(BadInput, match="does not hold the state of this model's training"):
            resume.restore({"step": 4, "training": training}, tensors)


# ---------------------------------------------------------------------------------------------
# What may change, and what may not


def interrupted(call, *flags):
    before_call(tasks, "take", call, stop)
    command(*flags)


def test_what_changes_no_result_may_change_on_resume(tmp_path):
    flags, log = [*DPO, *tiny_checkpoints(tmp_path), "--pairs=24", "--steps=6"], tmp_path / "log"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ended(fork(command, *flags, f"--out={whole}", output=log)) == 0, log.read_text()
    flags += [f"--out={parts}"]
    assert ended(fork(interrupted, 3, *flags, output=log)) == 130, log.read_text()
    more = ["--accum=2", "--grad-checkpoint", "--save-every=1", "--resume"]
    assert ended(fork(command, *flags, *more, output=log)) == 0, log.read_text()
    one, other = weights(whole), weights(parts)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-6


def test_a_longer_run_goes_on_at_the_constant_rate_on_the_same_pairs(tmp_path):
    """20 steps have 2 of warm-up and 40 have 4; both rates are constant after these."""
    out, log = tmp_path / "run", tmp_path / "log"
    flags = [*DPO, *tiny_checkpoints(tmp_path), f"--out={out}"]
    assert ended(fork(command, *flags, "--steps=20", output=log)) == 0, log.read_text()
    shorter = (out / "metrics.jsonl").read_text()
    longer = [*flags, "--resume", "--steps=40"]
    assert ended(fork(command, *longer, output=log)) == 0, log.read_text()
    state = checkpoint.load_checkpoint(out / "last.pt")
    assert state["step"] == 40 and state["settings"]["pairs"] == "80"  # 20 x 4
    lines = (out / "metrics.jsonl").read_text()
    assert lines.startswith(shorter) and len(lines.splitlines()) == 40


def few_prompts(*flags):
    rounds.MOST_PROMPTS = 2
    command(*flags)


def test_a_change_that_changes_the_result_is_refused(refused, tmp_path):
    models, in_rounds = tiny_checkpoints(tmp_path), ["--rounds=2", "--clips=2"]
    rule = "a run can only get longer, after its warm-up, without --decay and --rounds"
    cases = [
        ([], ["--steps=3"], f"--steps was 4, now 3, but {rule}"),
        ([], ["--steps=100"], rule),  # its warm-up takes 10
        ([], ["--precision=bfloat16"], "--precision was float32"),
        (["--decay=0.5"], ["--steps=8"], rule),
        (in_rounds, ["--steps=8"], rule),
    ]
    for i, (begun, more, why) in enumerate(cases):
        out = f"--out={tmp_path / '-'.join(begun)}"
        flags = [*DPO, *models, "--steps=4", out, *begun]
        if i in (0, 3, 4):
            assert ended(fork(few_prompts, *flags)) == 0
        assert why in refused(out, *more, "--resume", first=flags)


def test_a_file_that_changed_since_the_run_began_is_named(refused, tmp_path):
    models, toy = tiny_checkpoints(tmp_path), tmp_path / "toy"
    shutil.copy(tmp_path / "velocity.pt", tmp_path / "reference.pt")
    export_toy.export(export_toy.arguments([str(toy), "--pairs=6", "--generated=0"]))
    files = {"init": tmp_path / "velocity.pt", "reward": tmp_path / "reward.pt"}
    files |= {"reference": tmp_path / "reference.pt", "data": toy / "train.csv"}
    flags = [*DPO, "--batch=2", "--steps=1", *models, f"--cache={tmp_path / 'cache'}"]
    flags += [f"--reference={files['reference']}", f"--data={files['data']}"]
    log = tmp_path / "log"
    begun = fork(command, *flags, f"--out={tmp_path / 'run'}", output=log)
    assert ended(begun) == 0, log.read_text()
    for flag, path in files.items():
        before = path.read_bytes()
        if flag == "data":  # its rows in another order
            head, *rows = path.read_text().splitlines()
            path.write_text("\n".join([head, *rows[::-1], ""]))
        else:
            torch.save({**torch.load(path), "step": 1}, path)
        assert f"{path} (--{flag}) has changed since" in refused("--resume", first=flags)
        path.write_bytes(before)


@pytest.mark.parametrize("algo", ["reward", "nrg"])
def test_a_reward_without_its_unit_is_refused_until_its_training_is_over(tmp_path, algo):
    init, _ = tiny_checkpoints(tmp_path)
    log, out = tmp_path / "log", tmp_path / "run"
    flags = [f"--algo={algo}", "--batch=2", "--steps=4", "--pairs=8", f"--out={out}"]
    flags += [init, "--read=1"] if algo == "nrg" else ["--generated=0"]
    assert ended(fork(interrupted, 2, *flags, output=log)) == 130, log.read_text()

    def use():
        if algo == "reward":
            command(*DPO, init, f"--reward={out / 'last.pt'}", "--steps=1", f"--out={out / 'dpo'}")
        sys.argv = ["sample.py", f"--ckpt={tmp_path / 'velocity.pt'}", "--nrg=1,1,1"]
        sys.argv += [f"--nrg-ckpt={out / 'last.pt'}", "--n=1", "--steps=1", "--device=cpu"]
        sys.argv += [f"--out={tmp_path / 'clips'}"]
        if algo == "nrg":
            cli.run(sample.main)

    log.unlink()
    assert ended(fork(use, output=log)) == 2
    assert f"{out / 'last.pt'}: its scores get their unit at the end" in log.read_text()
    assert ended(fork(command, *flags, "--resume", output=log)) == 0, log.read_text()
    assert ended(fork(use, output=log)) == 0, log.read_text()

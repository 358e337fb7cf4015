"""Bad days: the trainer is killed, the disk is full, the folder is taken, the numbers are not finite."""

import copy
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
from types import SimpleNamespace

import pytest
import torch
from forked import command, ended, fork, same, tiny_checkpoints, weights

import sample
import tasks
from model import load_velocity
from real_data import export_toy
from runtime import checkpoint, cli, distributed, resume
from runtime.cli import BadInput

RUN = ["--algo=pretrain", "--batch=2", "--steps=24", "--ema=0.9"]


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(module, name, call, half=False):
    """Has the process killed at the `call`-th call of module.name; `half` of a write is done by then."""
    honest, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            if half:
                args[1].write(b"PK\3\4 the first part of a checkpoint")
                args[1].flush()
            kill()
        return honest(*args, **kwargs)

    setattr(module, name, dying)


# Moments in and around a save, each met on purpose: before the write, in it, written but not on the disk, on the disk
# but not named, named but the folder's entry not on the disk; and the log's line before all of these.
MOMENTS = {
    "log": lambda call: dies_in(resume.Log, "write", call),
    "before the save": lambda call: dies_in(resume, "save_checkpoint", call),
    "in the save": lambda call: dies_in(torch, "save", call, half=True),
    "at fsync": lambda call: dies_in(os, "fsync", call),
    "before the rename": lambda call: dies_in(os, "replace", call),
    "after the rename": lambda call: dies_in(checkpoint, "fsync_folder", call),
}


def test_killed_25_times_and_resumed_each_time_the_run_ends_at_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begun = time.monotonic()
    assert ended(fork(command, *RUN, f"--out={whole}", "--save-every=1000")) == 0
    seconds = time.monotonic() - begun

    def run(moment):
        """The user's command, which dies at `moment`: a name and a call, or at no chosen one."""
        if moment:
            MOMENTS[moment[0]](moment[1])
        more = ["--resume"] if (parts / "last.pt").exists() else []
        command(*RUN, f"--out={parts}", "--save-every=3", *more)

    rng = random.Random(0)
    chosen = [(name, call) for name in MOMENTS for call in (1, 2)]
    moments = [*chosen, *[None] * (25 - len(chosen))]
    rng.shuffle(moments)
    reached, died = 0, 0
    for moment in moments:
        child = fork(run, moment)
        if not moment:
            time.sleep(rng.uniform(0, seconds / 4))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == 0:  # the run had come to its end: once more from the start
            assert same(
                *(checkpoint.load_checkpoint(folder / "last.pt") for folder in (whole, parts))
            )
            shutil.rmtree(parts)
            reached = 0
            continue
        assert status == -signal.SIGKILL
        died += 1
        if (parts / "last.pt").exists():  # whole, whatever was going on
            step = checkpoint.load_checkpoint(parts / "last.pt")["step"]
            assert step >= reached
            reached = step
    assert died >= 20
    assert ended(fork(run, None)) == 0
    assert same(*(checkpoint.load_checkpoint(folder / "last.pt") for folder in (whole, parts)))
    logs = [(folder / "metrics.jsonl").read_text() for folder in (whole, parts)]
    assert logs[0] == logs[1] and [
        json.loads(line)["step"] for line in logs[0].splitlines()
    ] == list(range(24))
    assert not list(parts.glob("*.tmp"))


def test_the_log_is_cut_in_place_to_the_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st'
    )  # killed in a write
    args = SimpleNamespace(out=tmp_path, ema=0.0)
    with resume.Log(args, 2, torch.nn.Linear(1, 1), {}) as log:
        log.write({"step": 2, "again": 1})
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "again": 1}\n'


# ---------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    """Runs train.py, which must end with one line and status 2; the line."""

    def run(*flags, prepare=lambda: None, out=tmp_path / "run"):
        def main():
            prepare()
            command(*RUN, f"--out={out}", *flags)

        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        status = ended(fork(main, output=log))
        error = [line for line in log.read_text().splitlines() if "error:" in line]
        assert status == 2 and len(error) == 1 and "Traceback" not in log.read_text(), (
            log.read_text()
        )
        return error[0]

    return run


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(refused, tmp_path):
    assert ended(fork(command, *RUN, f"--out={tmp_path / 'run'}", "--steps=2")) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert "last.pt: a run is there already; continue it by --resume" in refused()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_folder_that_another_run_is_writing_is_refused(refused, tmp_path):
    args = SimpleNamespace(out=tmp_path / "run", ema=0.0)
    with resume.Log(args, 0, torch.nn.Linear(1, 1), {}) as log:
        log.file.write("a line of the other\n")
        log.file.flush()
        assert "another run is writing there" in refused()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "a line of the other\n"


def test_too_little_room_is_told_before_the_first_step(refused, tmp_path):
    # tiny: 89,000 parameters and Adam's two moments are 1.1 MB, and two such files stand side by side
    def full():
        disk = namedtuple("disk", "total used free")
        shutil.disk_usage = lambda path: disk(10**9, 10**9 - 10**6, 10**6)

    assert "0.00 GB free" in refused(prepare=full)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_last_checkpoint(refused, tmp_path):
    """No file may grow beyond 100 kB from the second save on, as if there was no more room."""

    def fills():
        honest, calls = resume.save_checkpoint, []

        def save(*args):
            calls.append(1)
            if len(calls) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            honest(*args)

        resume.save_checkpoint = save

    assert "cannot write" in refused("--save-every=3", prepare=fills)
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert [path.name for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp"] == []


def test_a_log_that_cannot_grow_stops_the_run_as_well(refused, tmp_path):
    def fills():
        honest = resume.Log.write

        def write(log, record, sync=False):
            if record["step"] == 4:
                resource.setrlimit(
                    resource.RLIMIT_FSIZE, (4000, 4000)
                )  # what is told must still find room
                record = record | {"blank": " " * 10_000}
            honest(log, record, sync)

        resume.Log.write = write

    line = refused("--save-every=3", prepare=fills)
    assert "cannot write" in line and "last.pt, after step 2, is the last good state" in line
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3


def test_adapters_with_averaged_weights_can_be_sampled_and_resumed(tmp_path):
    out = tmp_path / "run"
    flags = [
        "--algo=dpo",
        *tiny_checkpoints(tmp_path),
        "--lora-rank=2",
        "--ema=0.9",
        "--batch=2",
        "--pairs=8",
    ]
    flags += ["--freeze=1", "--steps=3", f"--out={out}"]
    assert ended(fork(command, *flags)) == 0
    model, _ = load_velocity(out / "last.pt")
    state, base = (
        checkpoint.load_checkpoint(path) for path in (out / "last.pt", tmp_path / "velocity.pt")
    )
    name = "blocks.2.attn.qkv"
    up, down = state["averaged"][f"{name}.up"], state["averaged"][f"{name}.down"]
    assert up.any() and not torch.equal(up, state["trained"][f"{name}.up"])
    merged = base["model"][f"{name}.weight"] + 2 * up @ down  # alpha is twice the rank
    assert torch.allclose(model.blocks[2].attn.qkv.weight, merged, atol=1e-7)
    assert ended(fork(command, *flags, "--resume")) == 0
    assert same(checkpoint.load_checkpoint(out / "last.pt"), state)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run_before_they_are_used(refused, tmp_path, what):
    def poison():
        honest = distributed.wrap_model

        def wrap_model(task, device, args):
            whole, calls = task.loss, []

            def loss(batch):
                value, logs = whole(batch)
                calls.append(1)
                if (
                    len(calls) == 8
                ):  # step 7; the gradient of sqrt(0 x) is not a number, its value is 0
                    value = value * float("nan") if what == "loss" else value + (value * 0).sqrt()
                return value, logs

            task.loss = loss
            return honest(task, device, args)

        distributed.wrap_model = wrap_model

    line = refused("--save-every=3", "--seed=5", prepare=poison)
    seed = (5 * 1_000_003 + 7) * 2 + 1  # data.step_rng
    assert "at step 7 (--seed 5" in line and f"the batch's {seed}" in line
    assert "last.pt, after step 5, is the last good state" in line
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert state["step"] == 6 and all(
        torch.isfinite(value).all() for value in state["model"].values()
    )
    assert (
        len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 7
    )  # 0 to 6, nothing of step 7


def test_a_checkpoint_of_other_sizes_is_not_resumed(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other = copy.deepcopy(optimizer.state_dict())
    other["state"][0]["exp_avg"] = torch.zeros(2, 1)
    names = dict(model.named_parameters())
    good = {
        "step": 4,
        "optimizer": optimizer.state_dict(),
        "model": {k: v.detach() + 1 for k, v in names.items()},
    }
    assert resume.restore(good, names, {}, optimizer) == 4
    for spoiled in (
        {"model": {"weight": torch.zeros(2, 3)}},
        {"model": {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"optimizer": other},
        {"optimizer": 3},
        {"model": []},
    ):
        with pytest.raises(BadInput, match="does not hold the state of this model's training"):
            resume.restore({**good, **spoiled, "path": tmp_path / "last.pt"}, names, {}, optimizer)


# ---------------------------------------------------------------------------------------------
# What may change, and what may not


DPO = ["--algo=dpo", "--batch=4", "--pairs=24", "--freeze=1", "--precision=float32", "--lr=1e-3"]


def test_what_changes_no_result_may_change_on_resume(tmp_path):
    flags, log = [*DPO, *tiny_checkpoints(tmp_path), "--steps=6"], tmp_path / "log"
    assert ended(fork(command, *flags, f"--out={tmp_path / 'whole'}", output=log)) == 0, (
        log.read_text()
    )
    parts = [*flags, f"--out={tmp_path / 'parts'}"]
    assert ended(fork(partial(run_until, 3), *parts, output=log)) == 130, log.read_text()
    more = ["--accum=2", "--grad-checkpoint", "--save-every=1", "--resume"]
    assert ended(fork(command, *parts, *more, output=log)) == 0, log.read_text()
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-6


def run_until(steps, *flags):
    """train.py, which SIGINT stops after so many steps."""
    honest, calls = tasks.take, []

    def take(*args):
        calls.append(1)
        if len(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return honest(*args)

    tasks.take = take
    command(*flags)


def test_a_longer_run_goes_on_at_the_constant_rate_on_the_same_pairs(tmp_path):
    """20 steps have 2 of warm-up and 40 have 4; both rates are constant after these."""
    models, log = tiny_checkpoints(tmp_path), tmp_path / "log"
    flags = [flag for flag in DPO if "pairs" not in flag] + models
    assert (
        ended(fork(command, *flags, "--steps=20", f"--out={tmp_path / 'run'}", output=log)) == 0
    ), log.read_text()
    shorter = (tmp_path / "run" / "metrics.jsonl").read_text()
    longer = [*flags, f"--out={tmp_path / 'run'}", "--resume"]
    assert ended(fork(command, *longer, "--steps=40", output=log)) == 0, log.read_text()
    state = checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")
    assert (
        state["step"] == 40 and state["settings"]["pairs"] == "80"
    )  # 20 x 4, one epoch of the shorter run
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.startswith(shorter) and len(lines.splitlines()) == 40


@pytest.mark.parametrize(
    ("begun", "more", "why"),
    [
        (["--steps=4"], ["--steps=3"], "--steps was 4, now 3, but a run can only get longer"),
        (["--steps=4", "--decay=0.5"], ["--steps=8", "--decay=0.5"], "with --decay 0.5"),
        (["--steps=4"], ["--steps=100"], "the warm-up is not over after 4 steps"),  # it takes 10
        (
            ["--steps=4", "--rounds=2", "--clips=2"],
            ["--steps=8", "--rounds=2", "--clips=2"],
            "--steps / --rounds",
        ),
        (["--steps=4"], ["--steps=4", "--precision=bfloat16"], "--precision was float32"),
    ],
)
def test_a_change_that_changes_the_result_is_refused(tmp_path, begun, more, why):
    dpo = [flag for flag in DPO if "pairs" not in flag]
    flags, log = [*dpo, *tiny_checkpoints(tmp_path), f"--out={tmp_path / 'run'}"], tmp_path / "log"
    assert ended(fork(command, *flags, *begun, output=log)) == 0, log.read_text()
    log.unlink()
    assert ended(fork(command, *flags, *more, "--resume", output=log)) == 2
    assert len(log.read_text().splitlines()) == 1 and why in log.read_text()


@pytest.mark.parametrize("flag", ["init", "reward", "reference", "data"])
def test_a_file_that_changed_since_the_run_began_is_named(tmp_path, flag):
    models, log, toy = tiny_checkpoints(tmp_path), tmp_path / "log", tmp_path / "toy"
    shutil.copy(tmp_path / "velocity.pt", tmp_path / "reference.pt")
    export_toy.export(export_toy.arguments(["export", str(toy), "--pairs=6", "--generated=0"]))
    files = {"init": tmp_path / "velocity.pt", "reward": tmp_path / "reward.pt"}
    files |= {"reference": tmp_path / "reference.pt", "data": toy / "train.csv"}
    flags = [
        "--algo=dpo",
        "--batch=2",
        "--steps=1",
        "--freeze=1",
        *models,
        f"--out={tmp_path / 'run'}",
    ]
    flags += [
        f"--reference={files['reference']}",
        f"--data={files['data']}",
        f"--cache={tmp_path / 'cache'}",
    ]
    assert ended(fork(command, *flags, output=log)) == 0, log.read_text()
    if flag == "data":  # its rows in another order
        head, *rows = files[flag].read_text().splitlines()
        files[flag].write_text("\n".join([head, *rows[::-1], ""]))
    else:
        state = torch.load(files[flag], weights_only=True)
        torch.save({**state, "step": 1}, files[flag])
    log.unlink()
    assert ended(fork(command, *flags, "--resume", output=log)) == 2
    assert len(log.read_text().splitlines()) == 1
    assert f"{files[flag]} (--{flag}) has changed since" in log.read_text()


@pytest.mark.parametrize("algo", ["reward", "nrg"])
def test_a_reward_without_its_unit_is_refused_until_its_training_is_over(tmp_path, algo):
    init, reward = tiny_checkpoints(tmp_path)
    log, out = tmp_path / "log", tmp_path / "run"
    flags = [
        f"--algo={algo}",
        "--batch=2",
        "--steps=4",
        "--generated=0",
        "--pairs=8",
        f"--out={out}",
    ]
    flags += [init, "--read=1"] if algo == "nrg" else []
    assert ended(fork(partial(run_until, 2), *flags, output=log)) == 130, log.read_text()

    def use():
        sys.argv = [
            "sample.py",
            f"--ckpt={tmp_path / 'velocity.pt'}",
            "--nrg=1,1,1",
            f"--nrg-ckpt={out / 'last.pt'}",
        ]
        sys.argv += ["--n=1", "--steps=1", f"--out={tmp_path / 'clips'}", "--device=cpu"]
        cli.run(sample.main)

    if algo == "reward":
        use = partial(
            command,
            *DPO,
            init,
            f"--reward={out / 'last.pt'}",
            "--steps=1",
            f"--out={tmp_path / 'dpo'}",
        )
    log.unlink()
    assert ended(fork(use, output=log)) == 2
    assert (
        f"{out / 'last.pt'}: its scores get their unit at the end of the training"
        in log.read_text()
    )
    assert ended(fork(command, *flags, "--resume", output=log)) == 0, log.read_text()
    assert ended(fork(use, output=log)) == 0, log.read_text()


def test_a_table_is_printed_though_the_last_save_fails(refused, tmp_path):
    def fills():
        honest = resume.save_final

        def save_final(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            return honest(*args)

        resume.save_final = save_final

    assert "cannot write" in refused("--steps=3", prepare=fills)
    assert "CFG 2: true score" in (tmp_path / "log").read_text()
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3

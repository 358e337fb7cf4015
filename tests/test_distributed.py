"""Two processes on one CPU, by gloo: DDP, FSDP and accumulation take the steps of one process."""

import json
import os
import re
import sys
import time
from datetime import timedelta

import pytest
import torch
from forked import TINY, command, ended, fork, tiny_checkpoints, together, weights, with_read
from test_resume import before_call, stop

import tasks
from data import draw_noise, mean_one, take
from model import PRESETS
from runtime import checkpoint, cli, distributed
from settings import settings_of

ALGORITHMS = ("pretrain", "reward", "nrg", "sft", "rwr", "dpo")
SPREAD = ("pretrain", "reward", "nrg", "dpo")  # over processes; sft's and rwr's loss is pretrain's
WAYS = {
    "one": [],
    "accum": ["--accum=2"],
    "ddp": ["--accum=2"],
    "fsdp": ["--accum=2", "--fsdp", "--save-every=3"],
}
# Only rounding reaches these, and Adam makes a step of a rounding error: a score's constant cancels
# in a pair's difference, and a constant in a query's logits in their softmax.
NO_GRADIENT = re.compile(r"key\.bias|head\.bias|mean|std")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder/way/algorithm: the same three steps in four ways."""
    folder = tmp_path_factory.mktemp("runs")
    files, log = tiny_checkpoints(folder), folder / "log"

    def flags(way, algo):
        own = [f"--algo={algo}", "--steps=3", "--batch=4", "--lr=1e-4", "--precision=float32"]
        own += [*WAYS[way], f"--out={folder / way / algo}"]
        return with_read(own, *files, "--pairs=24", "--beta=20", "--generated=0")

    for way in ("one", "accum"):
        for algo in ALGORITHMS:
            assert ended(fork(command, *flags(way, algo), output=log)) == 0, log.read_text()
    for way in ("ddp", "fsdp"):
        cases = [flags(way, algo) for algo in SPREAD]
        assert together(command, cases, output=log) == [0, 0], log.read_text()
    return folder


def furthest(one, other):
    assert one.keys() == other.keys()
    names = [name for name in one if not NO_GRADIENT.match(name)]
    return max((one[name] - other[name]).abs().max().item() for name in names)


@pytest.mark.parametrize(
    ("way", "algo"),
    [("accum", a) for a in ALGORITHMS] + [(way, a) for way in ("ddp", "fsdp") for a in SPREAD],
)
def test_every_way_takes_the_same_steps(runs, way, algo):
    one, other = weights(runs / "one" / algo), weights(runs / way / algo)
    assert furthest(one, other) < (1e-6 if way == "accum" else 1e-5)
    if algo in ("sft", "rwr", "dpo"):  # and they are steps
        start = checkpoint.load_checkpoint(runs / "velocity.pt")["model"]
        assert furthest(one, start) > 1e-4
    logs = [(runs / name / algo / "metrics.jsonl").read_text() for name in ("one", way)]
    losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_each_process_makes_its_own_slice_of_the_batch(runs, monkeypatch, algo):
    monkeypatch.setitem(PRESETS, "nano", TINY)
    files = [f"--init={runs / 'velocity.pt'}", f"--reward={runs / 'reward.pt'}"]
    flags = [f"--algo={algo}", "--steps=5", "--batch=4", "--device=cpu"]
    settings = settings_of(with_read(flags, *files, "--pairs=24", "--generated=0"))
    task = tasks.TASKS[algo](settings, torch.device("cpu"))
    whole, *halves = (task.batch(3, slice(*rows)) for rows in ((0, 4), (0, 2), (2, 4)))
    rows = 8 if algo in ("sft", "rwr") else 4
    for name, value in whole.items():
        assert len(value) == rows and all(len(half[name]) == rows // 2 for half in halves)
        assert torch.equal(torch.cat([half[name] for half in halves]), value)


def blocks_of_process_0(out):
    """Process 0 takes longer than training waits, and alone enters a block inside the first."""
    distributed.timedelta = lambda **time: timedelta(seconds=2 * time.get("hours", 100))
    distributed.start_process("cpu")
    for number in range(2):
        with distributed.process_0_first():
            if distributed.rank() == 0:
                with distributed.process_0_first():
                    time.sleep(3 - 3 * number)
                (out / str(number)).touch()
            if not (out / str(number)).exists():
                sys.exit(3)
    distributed.stop_process()
    print("done")


def process_0_fails():
    def main():
        distributed.start_process("cpu")
        with distributed.process_0_first():
            raise cli.BadInput("line 3 is wrong")

    cli.FIRST = os.environ["RANK"] == "0"
    cli.run(main)


def test_processes_wait_for_process_0_for_as_long_as_it_takes(tmp_path):
    log = tmp_path / "log"
    assert together(blocks_of_process_0, [(tmp_path,)], output=log) == [0, 0], log.read_text()
    assert log.read_text() == "done\ndone\n"
    log.unlink()
    assert together(process_0_fails, [()], output=log) == [2, 2], log.read_text()
    assert len(log.read_text().splitlines()) == 1


def test_a_sharded_run_resumes_bit_for_bit(runs, tmp_path):
    """From step 3 of a run of 5, and against the run that was not stopped."""
    models = [f"--init={runs / 'velocity.pt'}", f"--reward={runs / 'reward.pt'}"]
    flags = ["--algo=dpo", *models, "--batch=4", "--lr=1e-4", "--pairs=24", "--steps=5"]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"
    sharded = [*flags, "--fsdp", "--ema=0.9"]

    def stopped():
        """SIGINT reaches one of the two, in step 2."""
        if os.environ["RANK"] == "1":
            before_call(tasks, "take", 3, stop)
        command(*sharded, f"--out={parts}")

    def no_table(*more):
        def evaluate(*_, **__):
            raise cli.BadInput("no table")

        tasks.alignment_table = evaluate
        command(*sharded, f"--out={parts}", *more)

    def restarted():
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        command(*sharded, f"--out={parts}")

    assert together(command, [(*sharded, f"--out={whole}")], output=log) == [0, 0], log.read_text()
    assert together(stopped, [()], output=log) == [130, 130], log.read_text()
    assert "stopped after step 3" in log.read_text()
    resumed = [(*sharded, f"--out={parts}", "--resume")]
    for way, cases, status in ((no_table, [["--resume"]], 2), (command, resumed, 0)):
        assert together(way, cases, output=log) == [status, status], log.read_text()
        one, other = weights(whole), weights(parts)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    logs = [(out / "metrics.jsonl").read_text() for out in (whole, parts)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 5
    # started again by torchrun with the same flags it goes on, here at its end
    assert together(restarted, [()], output=log) == [0, 0], log.read_text()
    assert (parts / "metrics.jsonl").read_text() == logs[0]
    log.unlink()
    one_process = [*flags, "--ema=0.9", f"--out={parts}", "--resume"]
    assert ended(fork(command, *one_process, output=log)) == 0, log.read_text()


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_and_micro_batches_draw_the_rows_of_the_whole(monkeypatch, processes):
    """Draws of 6 clips: t, noise, noise again, cut for processes and then for two micro-batches."""

    def drawn(rows):
        rng = torch.Generator().manual_seed(7)
        whole = draw_noise(6, (2, 3), 3.0, rng)
        return take({**whole, "x1_b": torch.randn(6, 2, 3, generator=rng)}, rows)

    rng = torch.Generator().manual_seed(7)
    u = torch.rand(6, generator=rng)
    x1, x1_b = torch.randn(6, 2, 3, generator=rng), torch.randn(6, 2, 3, generator=rng)
    found = {name: [] for name in ("t", "x1", "x1_b")}
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for number in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        rows = distributed.local_rows(6)
        assert rows == slice(6 // processes * number, 6 // processes * (number + 1))
        count = 1 if processes == 2 else 2  # 3 clips a process do not halve
        for name, value in drawn(rows).items():
            found[name] += value.chunk(count)
    assert torch.equal(torch.cat(found["x1"]), x1) and torch.equal(torch.cat(found["x1_b"]), x1_b)
    assert torch.allclose(torch.cat(found["t"]), 3 * u / (1 + 2 * u), atol=1e-7)  # the shift by 3


def test_weights_of_mean_one_divide_a_masked_mean_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)  # 5 of 12
    weight = mean_one(mask)
    assert torch.allclose(weight, 12 / 5 * mask.float())  # all weigh 1 on average
    value = torch.arange(12.0).reshape(4, 3)  # valid: 0 1 2 | 3 | 9, mean 3
    # a half's mean is over all its six entries: 2.4 (0 + 1 + 2 + 3) / 6 = 2.4 and 2.4 x 9 / 6 = 3.6
    halves = [(w * v).mean().item() for w, v in zip(weight.chunk(2), value.chunk(2))]
    assert halves == pytest.approx([2.4, 3.6]) and sum(halves) / 2 == pytest.approx(3.0)
    assert not mean_one(torch.zeros(4, 3, dtype=torch.bool)).any()  # nothing is divided by 0

"""Two processes on one CPU, by gloo: DDP, FSDP and accumulation take the steps of one process."""

import json
import os
import re
import sys
import time
from datetime import timedelta

import pytest
import torch
from forked import command, ended, fork, same, tiny_checkpoints, together, weights, with_read
from test_resume import before_call, stop

import tasks
from data import mean_one
from runtime import checkpoint, cli, distributed

SPREAD = ("pretrain", "reward", "nrg", "dpo")  # sft's and rwr's loss is pretrain's
WAYS = {
    "ddp": (["--accum=2"], SPREAD),
    "fsdp": (["--accum=2", "--fsdp", "--save-every=3"], ("nrg", "dpo")),
}
# Only rounding reaches these, and Adam makes a step of a rounding error: a score's constant cancels
# in a pair's difference, and a constant in a query's logits in their softmax.
NO_GRADIENT = re.compile(r"key\.bias|head\.bias|mean|std")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder/way/algorithm: the same three steps in three ways."""
    folder = tmp_path_factory.mktemp("runs")
    files, log = tiny_checkpoints(folder), folder / "log"

    def flags(way, algo, more):
        own = [f"--algo={algo}", "--steps=3", "--batch=4", "--lr=1e-4", "--precision=float32"]
        own += [*more, f"--out={folder / way / algo}"]
        return with_read(own, *files, "--pairs=24", "--beta=20", "--generated=0")

    for algo in SPREAD:
        assert ended(fork(command, *flags("one", algo, []), output=log)) == 0, log.read_text()
    for way, (more, algorithms) in WAYS.items():
        cases = [flags(way, algo, more) for algo in algorithms]
        assert together(command, cases, output=log) == [0, 0], log.read_text()
    return folder


def furthest(one, other):
    assert one.keys() == other.keys()
    names = [name for name in one if not NO_GRADIENT.match(name)]
    return max((one[name] - other[name]).abs().max().item() for name in names)


@pytest.mark.parametrize(("way", "algo"), [(way, a) for way in WAYS for a in WAYS[way][1]])
def test_every_way_takes_the_same_steps(runs, way, algo):
    one, other = weights(runs / "one" / algo), weights(runs / way / algo)
    assert furthest(one, other) < 1e-5
    if algo == "dpo":  # and they are steps
        start = checkpoint.load_checkpoint(runs / "velocity.pt")["model"]
        assert furthest(one, start) > 1e-4
    logs = [(runs / name / algo / "metrics.jsonl").read_text() for name in ("one", way)]
    lines = [[json.loads(line) for line in log.splitlines()] for log in logs]
    for name in ("loss", "grad_norm"):
        one, other = ([line[name] for line in each] for each in lines)
        assert len(one) == 3 and other == pytest.approx(one, rel=1e-4, abs=1e-5)


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
    """From step 2 of a run of 4, and against the run that was not stopped."""
    models = [f"--init={runs / 'velocity.pt'}", f"--reward={runs / 'reward.pt'}"]
    flags = [*models, *"--algo=dpo --batch=4 --lr=1e-4 --pairs=16 --steps=4 --ema=0.9".split()]
    whole, parts, log = tmp_path / "whole", tmp_path / "parts", tmp_path / "log"

    def stopped():
        """SIGINT reaches one of the two, in step 1."""
        if os.environ["RANK"] == "1":
            before_call(tasks, "take", 2, stop)
        command(*flags, "--fsdp", f"--out={parts}")

    def restarted():
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        command(*flags, "--fsdp", f"--out={parts}")

    def run(function, *args, status=0):
        assert together(function, [args], output=log) == [status, status], log.read_text()

    run(command, *flags, "--fsdp", f"--out={whole}")
    run(stopped, status=130)
    assert "stopped after step 2" in log.read_text()
    run(restarted)  # by torchrun with the same flags
    assert same(weights(whole), weights(parts))
    logs = [(out / "metrics.jsonl").read_text() for out in (whole, parts)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 4
    one_process = fork(command, *flags, f"--out={parts}", "--resume", output=log)
    assert ended(one_process) == 0, log.read_text()


def test_weights_of_mean_one_divide_a_masked_mean_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)  # 5 of 12
    weight = mean_one(mask)
    assert torch.allclose(weight, 12 / 5 * mask.float())  # all weigh 1 on average
    value = torch.arange(12.0).reshape(4, 3)  # valid: 0 1 2 | 3 | 9, mean 3
    # a half's mean is over all its six entries: 2.4 (0 + 1 + 2 + 3) / 6 = 2.4 and 2.4 x 9 / 6 = 3.6
    halves = [(w * v).mean().item() for w, v in zip(weight.chunk(2), value.chunk(2))]
    assert halves == pytest.approx([2.4, 3.6]) and sum(halves) / 2 == pytest.approx(3.0)
    assert not mean_one(torch.zeros(4, 3, dtype=torch.bool)).any()  # nothing is divided by 0

"""Two processes on one CPU, by gloo: DDP, FSDP and accumulation take the very steps of one process."""

import json
import os
import pickle
import re
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked import TINY, command, ended, fork, tiny_checkpoints, together, weights, with_read

import tasks
from data import draw_noise, mean_one, take
from model import PRESETS
from runtime import checkpoint, cli, distributed, resume
from settings import settings_of

ALGORITHMS = ("pretrain", "reward", "nrg", "sft", "rwr", "dpo")
SPREAD = (
    "pretrain",
    "reward",
    "nrg",
    "dpo",
)  # over two processes; sft's and rwr's loss is pretrain's
# Nothing but rounding reaches these, and Adam makes a step of a rounding error: a score's constant cancels in a pair's
# difference, and a constant in a query's logits in their softmax. It shows in the scores' mean, which is no weight.
NO_GRADIENT = re.compile(r"key\.bias|head\.bias|mean|std")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder/way/algorithm: the same five steps in four ways."""
    folder = tmp_path_factory.mktemp("runs")
    files = tiny_checkpoints(folder)

    def flags(way, algo, *more):
        own = [
            f"--algo={algo}",
            "--steps=5",
            "--batch=4",
            "--lr=1e-4",
            "--precision=float32",
            *more,
        ]
        return with_read([*own, f"--out={folder / way / algo}"], *files, "--pairs=24", "--beta=20")

    log = folder / "log"
    for way, more in {"one": [], "accum": ["--accum=2"]}.items():
        for algo in ALGORITHMS:
            assert ended(fork(command, *flags(way, algo, *more), output=log)) == 0, log.read_text()
    for way, more in {
        "ddp": ["--accum=2"],
        "fsdp": ["--fsdp", "--accum=2", "--save-every=3"],
    }.items():
        done = together(command, [flags(way, algo, *more) for algo in SPREAD], output=log)
        assert done == [0, 0], log.read_text()
    return folder


@pytest.mark.parametrize(
    ("way", "algo"),
    [("accum", a) for a in ALGORITHMS] + [(way, a) for way in ("ddp", "fsdp") for a in SPREAD],
)
def test_every_way_takes_the_same_steps(runs, way, algo):
    start, one, other = (
        runs / "velocity.pt",
        weights(runs / "one" / algo),
        weights(runs / way / algo),
    )
    assert one.keys() == other.keys()
    furthest = max(
        (one[name] - other[name]).abs().max().item() for name in one if not NO_GRADIENT.match(name)
    )
    assert furthest < (1e-6 if way == "accum" else 1e-5)
    if algo in ("sft", "rwr", "dpo"):  # and they are steps
        before = checkpoint.load_checkpoint(start)["model"]
        assert max((one[name] - before[name]).abs().max().item() for name in one) > 1e-4
    logs = [
        (runs / name / algo / "metrics.jsonl").read_text().splitlines() for name in ("one", way)
    ]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_each_process_makes_its_own_slice_of_the_batch(runs, monkeypatch, algo):
    monkeypatch.setitem(PRESETS, "nano", TINY)
    files = [f"--init={runs / 'velocity.pt'}", f"--reward={runs / 'reward.pt'}"]
    flags = with_read(
        [f"--algo={algo}", "--steps=5", "--batch=4", "--device=cpu"], *files, "--pairs=24"
    )
    args = settings_of(flags)
    task = tasks.TASKS[algo](args, torch.device("cpu"))
    whole, *halves = (task.batch(3, slice(*rows)) for rows in ((0, 4), (0, 2), (2, 4)))
    rows = 8 if algo in ("sft", "rwr") else 4
    for name, value in whole.items():
        assert len(value) == rows and all(len(half[name]) == rows // 2 for half in halves)
        assert torch.equal(torch.cat([half[name] for half in halves]), value)


def blocks_of_process_0(out):
    """Process 0 takes longer than the timeout of a barrier, and alone enters a block inside the first one."""
    distributed.timedelta = lambda hours: timedelta(seconds=2 * hours)
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


def test_processes_wait_for_process_0_for_as_long_as_it_takes(tmp_path):
    log = tmp_path / "log"
    assert together(blocks_of_process_0, [(tmp_path,)], output=log) == [0, 0], log.read_text()
    assert log.read_text() == "done\ndone\n"


def fork_restarted(flags, out, log):
    def restart():
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        command(*flags, f"--out={out}")

    return together(restart, [()], output=log)


def test_shards_resume_to_the_same_bits_and_the_model_comes_out_whole(runs, tmp_path):
    """From step 3 of a run of 5, and against the run that was not stopped."""
    whole = runs / "fsdp" / "dpo"
    assert [path.name for path in whole.glob("shards*")] == [
        "shards-5"
    ]  # step 3's went when step 5's was whole
    files = [
        f"--init={runs / 'velocity.pt'}",
        f"--reward={runs / 'reward.pt'}",
        "--fsdp",
        "--ema=0.9",
    ]
    flags = ["--algo=dpo", *files, "--batch=4", "--lr=1e-4", "--pairs=24", "--steps=5"]

    def stopped():
        """SIGTERM reaches one of the two, in step 2."""
        honest = tasks.step_rng

        def stops(seed, step):
            if step == 2 and os.environ["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            return honest(seed, step)

        tasks.step_rng = stops
        command(*flags, f"--out={tmp_path / 'parts'}")

    log = tmp_path / "log"
    assert together(command, [(*flags, f"--out={tmp_path / 'whole'}")], output=log) == [0, 0], (
        log.read_text()
    )
    assert together(stopped, [()], output=log) == [130, 130], log.read_text()
    assert "stopped after step 3" in log.read_text()
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.is_dir()] == ["shards-3"]

    def no_table():
        def alignment_table(*_, **__):
            raise cli.BadInput("no table")

        tasks.alignment_table = alignment_table
        command(*flags, f"--out={tmp_path / 'parts'}", "--resume")

    resume_it = [(*flags, f"--out={tmp_path / 'parts'}", "--resume")]
    for way, cases, status in ((no_table, [()], 2), (command, resume_it, 0)):
        assert together(way, cases, output=log) == [status, status], log.read_text()
        one, other = (weights(tmp_path / name) for name in ("whole", "parts"))
        assert one.keys() == other.keys() and all(
            torch.equal(one[name], other[name]) for name in one
        )
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 5
    # started again by torchrun with the very same flags it goes on, here at its end
    again = fork_restarted(flags, tmp_path / "parts", log)
    assert again == [0, 0], log.read_text()
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == logs[0]
    # without --fsdp it is not this run
    log.unlink()
    assert (
        ended(
            fork(
                command,
                *flags[:3],
                *flags[4:],
                f"--out={tmp_path / 'parts'}",
                "--resume",
                output=log,
            )
        )
        == 2
    )
    assert len(log.read_text().splitlines()) == 1 and "--fsdp was True" in log.read_text()


class Hostile:
    def __reduce__(self):
        return open, ("executed", "w")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_index_of_shards_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = {"model.a": torch.arange(3.0)}
    dcp.save(tensors, checkpoint_id=tmp_path / "shards-1", no_dist=True)
    empty = {"model.a": torch.zeros(3)}
    resume.load_shards(tmp_path / "shards-1", empty)
    assert torch.equal(empty["model.a"], tensors["model.a"])
    index = tmp_path / "shards-1" / ".metadata"
    whole = index.read_bytes()
    for content in (pickle.dumps(Hostile()), whole[: len(whole) // 2], b"", b"text"):
        index.write_bytes(content)
        with pytest.raises(cli.BadInput, match="cannot be read as shards"):
            resume.load_shards(tmp_path / "shards-1", empty)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_and_micro_batches_draw_the_rows_of_the_whole(monkeypatch, processes):
    """Draws of 6 clips: t, noise, noise again, cut for processes and then for two micro-batches each."""

    def drawn(rows):
        rng = torch.Generator().manual_seed(7)
        whole = draw_noise(6, (2, 3), 3.0, rng)
        return take({**whole, "x1_b": torch.randn(6, 2, 3, generator=rng)}, rows)

    rng = torch.Generator().manual_seed(7)
    u = torch.rand(6, generator=rng)
    x1, x1_b = torch.randn(6, 2, 3, generator=rng), torch.randn(6, 2, 3, generator=rng)
    wanted = {
        "t": 3 * u / (1 + 2 * u),
        "x1": x1,
        "x1_b": x1_b,
    }  # the shift by 3, of the whole batch
    found = {name: [] for name in wanted}
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for number in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        rows = distributed.local_rows(6)
        assert rows == slice(6 // processes * number, 6 // processes * (number + 1))
        mine = drawn(rows)
        count = 1 if processes == 2 else 2  # 3 clips a process do not halve
        for i in range(count):
            for name, value in mine.items():
                found[name].append(value.chunk(count)[i])
    assert torch.equal(torch.cat(found["x1"]), x1) and torch.equal(torch.cat(found["x1_b"]), x1_b)
    assert torch.allclose(torch.cat(found["t"]), wanted["t"], atol=1e-7)


def test_weights_of_mean_one_divide_a_masked_mean_by_hand():
    mask = torch.tensor(
        [[True, True, True], [True, False, False], [False] * 3, [True, False, False]]
    )  # 5 of 12
    weight = mean_one(mask)
    assert torch.allclose(
        weight, 12 / 5 * mask.float()
    )  # each that counts weighs 2.4, so that all weigh 1 on average
    value = torch.arange(12.0).reshape(4, 3)  # valid: 0 1 2 | 3 | 9, mean 3
    # each half is a mean over all its six entries: 2.4 (0 + 1 + 2 + 3) / 6 = 2.4 and 2.4 x 9 / 6 = 3.6
    halves = [(w * v).mean().item() for w, v in zip(weight.chunk(2), value.chunk(2))]
    assert halves == pytest.approx([2.4, 3.6]) and sum(halves) / 2 == pytest.approx(3.0)
    assert not mean_one(torch.zeros(4, 3, dtype=torch.bool)).any()  # nothing is divided by 0

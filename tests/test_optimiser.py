"""The loop of train.py against numbers worked out by hand: AdamW's betas, warm-up, decay, clipping, no weight decay,
averaged weights and micro-batches, on a model of one parameter whose gradients are chosen.
"""

import json
import math

import pytest
import torch

import trainer
from model import ModelConfig
from runtime.checkpoint import load_checkpoint
from settings import settings_of
from trainer import lr_factor

CPU = torch.device("cpu")
RATE = 0.01


class One(torch.nn.Module):
    """One number, or a few, that a training moves."""

    config = ModelConfig()

    def __init__(self, *start):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start))
        self.frozen = torch.nn.Parameter(torch.tensor(5.0), requires_grad=False)


def run(out, gradients, *flags, start=(1.0,)):
    """Trains w by the gradients, a list of numbers or of lists for each step; -> (w before each step and at the end,
    the log's lines, what was evaluated)."""
    model, path, judged = One(*start), [], []
    wide = [each if isinstance(each, list) else [each] for each in gradients]

    def batch(step, rows):
        path.append(model.w.tolist())
        return {"g": torch.tensor(wide[step]).expand(4, -1)[rows]}

    def loss(batch):
        value = (batch["g"] * model.w).sum(1).mean()
        return value, {"loss": value.item()}

    def evaluate(final, out):
        judged.append(final.w.tolist())
        return ["judged"]

    task = trainer.Task("velocity", model, ["<pad>"], batch, loss, ("loss",), evaluate)
    args = settings_of(
        [
            f"--steps={len(wide)}",
            f"--lr={RATE}",
            "--batch=4",
            f"--out={out}",
            "--device=cpu",
            "--precision=float32",
            *flags,
        ]
    )
    lines = trainer.fit(task, args, CPU)
    assert lines[0] == "judged" and model.frozen.item() == 5.0
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [*path, model.w.tolist()], log, judged[0]


def adam(gradients, factors, start=1.0):
    """Adam by its definition (Kingma and Ba, algorithm 1) with betas .9 and .99 and no decay of weights."""
    w, m, v, path = start, 0.0, 0.0, [start]
    for n, (g, factor) in enumerate(zip(gradients, factors), 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w -= RATE * factor * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.99**n)) + 1e-8)
        path.append(w)
    return path


def close(path, wanted):
    assert [w for (w,) in path] == pytest.approx(wanted, abs=2e-6)


def test_three_steps_by_hand(tmp_path):
    # g = .5: both moments give .5, so w falls by the rate. Then g = -1: m = (.9 .05 - .1) / .19 = -.289474 and
    # v = (.99 .0025 + .01) / .0199 = .626884, so w rises by .01 .289474 / .791760 = .003656. Then g = 0: m = -.0495 /
    # .271 = -.182657, v = .99 .012475 / .029701 = .415820, so w rises by .01 .182657 / .644841 = .002833
    path, log, _ = run(tmp_path, [0.5, -1.0, 0.0])
    close(path, [1.0, 0.99, 0.993656, 0.996489])
    close(path, adam([0.5, -1.0, 0.0], [1, 1, 1]))
    assert [line["grad_norm"] for line in log] == pytest.approx([0.5, 1.0, 0.0])
    assert [line["loss"] for line in log] == pytest.approx([0.5, -0.99, 0.0], abs=1e-6)


def test_the_rate_rises_over_a_tenth_of_a_short_run(tmp_path):
    # 40 steps: a quarter, a half, three quarters of the rate, then all of it; a constant gradient's step is the rate
    path, _, _ = run(tmp_path, [0.3] * 40)
    steps = [(a - b) / RATE for (a,), (b,) in zip(path, path[1:])]
    assert steps == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 37, abs=1e-4)


def test_the_rate_falls_over_the_last_share_of_the_run(tmp_path):
    # ten steps, the last four of them: the rate times 4/4, 3/4, 2/4, 1/4
    path, _, _ = run(tmp_path, [0.3] * 10, "--decay=0.4")
    steps = [(a - b) / RATE for (a,), (b,) in zip(path, path[1:])]
    assert steps == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25], abs=1e-4)


def test_warm_up_takes_100_steps_of_a_long_run():
    assert [
        lr_factor(step, 6000, 0.4) for step in (0, 49, 99, 100, 3600, 4800, 5999)
    ] == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.5, 1 / 2400])


def test_a_gradient_longer_than_one_is_cut_to_one(tmp_path):
    # (3, 4) has norm 5 and becomes (.6, .8); what comes next, (.6, -.8) of norm 1, is left alone
    path, log, _ = run(tmp_path, [[3.0, 4.0], [0.6, -0.8], [0.0, 0.5]], start=(1.0, 1.0))
    wanted = zip(adam([0.6, 0.6, 0.0], [1] * 3), adam([0.8, -0.8, 0.5], [1] * 3))
    assert [number for pair in path for number in pair] == pytest.approx(
        [n for pair in wanted for n in pair], abs=2e-6
    )
    assert [line["grad_norm"] for line in log] == pytest.approx(
        [5.0, 1.0, 0.5], rel=1e-5
    )  # as it was, in the log


def test_without_a_gradient_a_weight_stays(tmp_path):
    path, _, _ = run(
        tmp_path, [0.0, 0.0, 0.0], start=(1000.0,)
    )  # torch's own weight decay would take 10 a step
    assert path == [[1000.0]] * 4


def test_averaged_weights_by_hand(tmp_path):
    # memory 1/10, 2/11, 3/12 of the average of before, the start being 1
    path, _, judged = run(tmp_path, [0.5, 0.5, 0.5], "--ema=0.9")
    w = [w for (w,) in path]
    assert w == pytest.approx([1.0, 0.99, 0.98, 0.97], abs=1e-5)
    one = 0.1 * 1 + 0.9 * 0.99  # .991
    two = 2 / 11 * one + 9 / 11 * 0.98  # .982
    three = 0.25 * two + 0.75 * 0.97  # .973
    assert judged == pytest.approx([three], abs=1e-5) and three == pytest.approx(0.973, abs=1e-9)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["model"]["w"].tolist() == judged
    assert state["training"]["model.w"].tolist() == path[-1]


def test_the_memory_of_averages_is_at_most_the_flag(tmp_path):
    _, _, judged = run(tmp_path, [0.5, 0.5, 0.5], "--ema=0.15")
    two = 0.15 * 0.991 + 0.85 * 0.98
    assert judged == pytest.approx([0.15 * two + 0.85 * 0.97], abs=1e-5)


def test_without_averages_the_last_weights_are_judged_and_saved(tmp_path):
    path, _, judged = run(tmp_path, [0.5, 0.5, 0.5], "--ema=0")
    assert judged == path[-1] == load_checkpoint(tmp_path / "last.pt")["model"]["w"].tolist()


def test_six_steps_with_averages_and_a_falling_rate(tmp_path):
    gradients = [0.5, -0.2, 0.9, 0.1, 0.4, -0.6]
    path, _, judged = run(tmp_path, gradients, "--ema=0.5", "--decay=0.5")
    close(path, adam(gradients, [1, 1, 1, 1, 2 / 3, 1 / 3]))
    average = 1.0
    for n, (w,) in enumerate(path[1:]):
        memory = min(0.5, (n + 1) / (n + 10))
        average = memory * average + (1 - memory) * w
    assert judged == pytest.approx([average], abs=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_are_averaged(tmp_path, parts):
    # rows of gradient 1, 0, 0, 0: their mean is 1/4 however the batch is cut
    model, seen = One(1.0), []

    def batch(step, rows):
        return {"g": torch.tensor([1.0, 0.0, 0.0, 0.0])[rows]}

    def loss(batch):
        seen.append(len(batch["g"]))
        return (batch["g"] * model.w).mean(), {"share": batch["g"].mean().item()}

    task = trainer.Task(
        "velocity", model, ["<pad>"], batch, loss, ("share",), lambda final, out: []
    )
    flags = [
        "--steps=1",
        "--batch=4",
        f"--accum={parts}",
        f"--out={tmp_path}",
        "--device=cpu",
        "--precision=float32",
    ]
    trainer.fit(task, settings_of(flags), CPU)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert seen == [4 // parts] * parts
    assert line["grad_norm"] == pytest.approx(0.25) and line["share"] == pytest.approx(0.25)


def test_a_training_sees_its_pairs_once_and_a_reward_twice():
    # Table 11 and --help: one epoch of pairs, two for the rewards; as many pairs as a DPO step takes
    for algo, epochs in (("dpo", 1), ("sft", 1), ("rwr", 1), ("reward", 2), ("nrg", 2)):
        for more in ([], ["--steps=70", "--batch=6"]):
            args = settings_of(["--algo", algo, *more])
            assert args.steps * args.batch == args.pairs * epochs
    assert settings_of(["--algo=dpo"]).align == (1.0, 1.0, 1.0)

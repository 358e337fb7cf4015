"""The training loop by hand: AdamW's betas, warm-up, decay, clipping, averaged weights and
micro-batches, on a model of one parameter whose gradients are chosen."""

import json

import pytest
import torch

import trainer
from model import ModelConfig
from runtime.checkpoint import load_checkpoint
from settings import settings_of
from trainer import lr_factor

RATE = 0.01


class One(torch.nn.Module):
    """Weights w that a training moves."""

    config = ModelConfig()

    def __init__(self, start):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start))
        self.frozen = torch.nn.Parameter(torch.tensor(5.0), requires_grad=False)


def run(out, gradients, *flags, start=(1.0,)):
    """Trains w by gradients (steps, len(w)); -> w before each step and at the end, the log's lines,
    and the w that is judged."""
    model, path, judged, sizes = One(start), [], [], []

    def batch(step, rows):
        path.append(model.w.tolist())
        rest = torch.zeros(3, len(start))  # the mean of the four rows is the gradient
        return {"g": torch.cat((4 * torch.tensor([gradients[step]]).reshape(1, -1), rest))[rows]}

    def loss(batch):
        sizes.append(len(batch["g"]))
        value = (batch["g"] * model.w).sum(1).mean()
        return value, {"loss": value.item()}

    def evaluate(final, out):
        judged.append(final.w.tolist())
        return ["judged"]

    task = trainer.Task("velocity", model, ["<pad>"], batch, loss, ("loss",), evaluate)
    flags = [f"--steps={len(gradients)}", f"--lr={RATE}", "--batch=4", f"--out={out}", *flags]
    settings = settings_of([*flags, "--device=cpu", "--precision=float32"])
    lines = trainer.fit(task, settings, torch.device("cpu"))
    assert lines[0] == "judged" and model.frozen.item() == 5.0
    assert sizes == [4 // settings.accum] * (settings.accum * len(gradients))
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [*path, model.w.tolist()], log, judged[0]


def close(path, wanted):
    assert torch.allclose(torch.tensor(path), torch.tensor(wanted), rtol=0, atol=2e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_three_steps_by_hand_in_any_number_of_micro_batches(tmp_path, parts):
    # g = .5: both moments give .5, so w falls by the rate. Then g = -1: m = (.9 .05 - .1) / .19 =
    # -.289474 and v = (.99 .0025 + .01) / .0199 = .626884, so w rises by .01 .289474 / .791760 =
    # .003656. Then g = 0: m = -.0495 / .271 = -.182657, v = .99 .012475 / .029701 = .415820, so w
    # rises by .01 .182657 / .644841 = .002833
    gradients = [0.5, -1.0, 0.0]
    path, log, judged = run(tmp_path, gradients, f"--accum={parts}")
    close(path, [[1.0], [0.99], [0.993656], [0.996489]])
    assert [line["grad_norm"] for line in log] == pytest.approx([0.5, 1.0, 0.0])
    assert [line["loss"] for line in log] == pytest.approx([0.5, -0.99, 0.0], abs=1e-6)
    assert judged == path[-1] == load_checkpoint(tmp_path / "last.pt")["model"]["w"].tolist()


def test_the_rate_rises_over_a_tenth_of_a_short_run_and_falls_over_its_last_share(tmp_path):
    # a constant gradient's step is the rate: 4 steps of warm-up, 4 of decay
    path, _, _ = run(tmp_path, [0.3] * 40, "--decay=0.1")
    steps = [(a - b) / RATE for (a,), (b,) in zip(path, path[1:])]
    assert steps == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 34 + [0.75, 0.5, 0.25], abs=1e-4)
    # of a long run, 100 steps
    long = [lr_factor(step, 6000, 0.4) for step in (0, 49, 99, 100, 3600, 4800, 5999)]
    assert long == pytest.approx([0.01, 0.5, 1.0, 1.0, 1.0, 0.5, 1 / 2400])


def test_a_gradient_longer_than_one_is_cut_to_one(tmp_path):
    # (3, 4) has norm 5 and becomes (.6, .8); (.6, -.8) of norm 1 is left alone
    path, log, _ = run(tmp_path, [[3.0, 4.0], [0.6, -0.8]], start=(1.0, 1.0))
    # .6 and .6: by the rate each. .8 and -.8: m = (.9 .08 - .08) / .19 = -.042105 and v = .64, so
    # the second w rises by .01 .042105 / .8 = .000526
    close(path, [[1.0, 1.0], [0.99, 0.99], [0.98, 0.990526]])
    norms = [line["grad_norm"] for line in log]  # before the cut
    assert norms == pytest.approx([5.0, 1.0], rel=1e-5)


def test_averaged_weights_by_hand(tmp_path):
    # memory 1/10, 2/11, 3/12 of the average of before, the start being 1
    path, _, judged = run(tmp_path, [0.5, 0.5, 0.5], "--ema=0.9")
    close(path, [[1.0], [0.99], [0.98], [0.97]])
    one = 0.1 * 1 + 0.9 * 0.99  # .991
    two = 2 / 11 * one + 9 / 11 * 0.98  # .982
    assert judged == pytest.approx([0.25 * two + 0.75 * 0.97], abs=1e-5)  # .973
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["model"]["w"].tolist() == judged
    assert state["training"]["model.w"].tolist() == path[-1]
    # the memory is at most the flag
    _, _, judged = run(tmp_path / "short", [0.5, 0.5, 0.5], "--ema=0.15")
    two = 0.15 * 0.991 + 0.85 * 0.98
    assert judged == pytest.approx([0.15 * two + 0.85 * 0.97], abs=1e-5)


def test_alignment_sees_its_pairs_once_and_a_reward_twice():
    # Table 11: one epoch of pairs; two for the rewards; as many pairs as a DPO step takes
    for algo, epochs in (("dpo", 1), ("sft", 1), ("rwr", 1), ("reward", 2), ("nrg", 2)):
        for more in ([], ["--steps=70", "--batch=6"]):
            settings = settings_of(["--algo", algo, *more])
            assert settings.steps * settings.batch == settings.pairs * epochs
    assert settings_of(["--algo=dpo"]).align == (1.0, 1.0, 1.0)

"""What bench.py counts as kept for backward, and its command."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import evaluate
import model
from model import ModelConfig
from runtime import cli
from studies import bench, jobs

SMALL = ModelConfig(
    frames=4, size=24, patch=(1, 4, 4), dim=64, depth=2, heads=2, max_text=4
)  # 148 tokens


def test_a_block_keeps_24_numbers_a_channel_and_checkpointed_its_input():
    # 24 a channel and token, as studies/cost.py counts them. A token besides keeps ten numbers: mean and deviation of
    # two norms, and for each of 2 heads what q and k are divided by and the softmax's sum; a clip keeps the 6 d numbers
    # of its modulation and the two 1 + scale, 8 d. Of 64 channels and 148 tokens: 24 + 10 / 64 + 8 / 148
    assert bench.saved_numbers(SMALL, checkpointed=False) <= 24 + 10 / 64 + 8 / 148 + 1e-6
    assert bench.saved_numbers(SMALL, checkpointed=True) <= 1.5


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_blocks_that_keep_everything(checkpointed, monkeypatch):
    network, (x0, _, y) = (
        bench.awake(replace(SMALL, depth=3), torch.device("cpu")),
        bench.clips(SMALL, 2, "cpu"),
    )

    def gradients():
        out = network(x0, torch.tensor([0.3, 0.8]), y)
        return torch.autograd.grad(out.square().mean(), list(network.parameters()))

    network.grad_checkpoint = checkpointed
    found = gradients()
    network.grad_checkpoint = False
    monkeypatch.setattr(model, "maybe_checkpoint", lambda enabled, block, *inputs: block(*inputs))
    for here, there in zip(found, gradients()):
        assert torch.equal(here, there)


def test_one_part_is_printed_and_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "MEDIUM", SMALL)
    argv = ["evaluate.py", "bench", "--only", "memory", "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    threads = torch.get_num_threads()
    cli.run(evaluate.main)
    torch.set_num_threads(threads)
    assert "checkpointed" in capsys.readouterr().out and not (tmp_path / "bench.json").exists()


def test_the_command_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "MEDIUM", SMALL)
    monkeypatch.setattr(bench, "PARTS", {"memory": bench.memory})
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "bench", "--out", str(tmp_path), "--device", "cpu"]
    )
    threads = torch.get_num_threads()
    cli.run(evaluate.main)
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["command"].startswith("python evaluate.py bench") and len(result["rows"]) == 2
    assert "checkpointed" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "bench", "--only", "speed", "--out", str(tmp_path)]
    )
    with pytest.raises(cli.BadInput, match="--only speed: no part of the bench; known: memory"):
        evaluate.main()


def test_a_slow_round_leaves_ratios_alone(monkeypatch):
    # a and b take 1 and 2 s, then 10 and 20, then 2 and 4.2, after a round that does not count
    took = [9.0, 9.0, 1.0, 2.0, 10.0, 20.0, 2.0, 4.2]
    times = iter([time for seconds in took for time in (0.0, seconds)])
    monkeypatch.setattr(jobs, "clock", lambda device: next(times))
    found = jobs.medians(
        {"a": lambda: None, "b": lambda: None}, torch.device("cpu"), rounds=3, ordered=True
    )
    assert found == pytest.approx(
        {"a": 6.2 / 3, "b": 2 * 6.2 / 3}
    )  # shares 1/3 and 2/3 of the middle round's time

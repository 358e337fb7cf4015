"""A GPU says what the CPU says: velocity, gradients, samples, and a training by the command."""

import json
import sys

import pytest
import torch

import train
from model import ModelConfig
from runtime import cli
from sample import sample
from studies import bench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CONFIG = ModelConfig(frames=4, size=16, patch=(1, 4, 4), dim=64, depth=2, heads=2)  # 72 tokens


def on(device, attention="full"):
    network = bench.awake(
        ModelConfig(**{**CONFIG.__dict__, "attention": attention}), torch.device("cpu")
    )
    return network.to(device)


def inputs():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, *CONFIG.video_shape, generator=rng)
    return (
        x,
        torch.tensor([0.2, 0.5, 0.9]),
        torch.randint(CONFIG.vocab, (3, CONFIG.max_text), generator=rng),
    )


@pytest.mark.parametrize("attention", ["full", "tile:1,4,4/3,1,1"])
def test_velocity_and_gradients(attention):
    found = {}
    for device in ("cpu", "cuda"):
        network = on(device, attention)
        v = network(*(x.to(device) for x in inputs()))
        gradients = torch.autograd.grad(v.square().mean(), list(network.parameters()))
        found[device] = [x.cpu() for x in (v, *gradients)]
    for here, there in zip(found["cpu"], found["cuda"]):
        assert (here - there).abs().max() <= 1e-4 * max(here.abs().max(), 1e-3)


def test_one_seed_is_one_sample():
    x1, _, y = inputs()
    clips = [sample(on(d), x1.to(d), y.to(d), steps=4, cfg=2.0).cpu() for d in ("cpu", "cuda")]
    assert (clips[0] - clips[1]).abs().max() <= 1e-3


def losses(folder, *flags):
    argv = [
        "train.py",
        "--algo",
        "pretrain",
        "--steps",
        "3",
        "--batch",
        "4",
        "--eval-prompts",
        "1",
        "--device",
        "cuda",
    ]
    sys.argv = [*argv, "--out", str(folder), *flags]
    cli.run(train.main)
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_compiled_checkpointed_and_in_bfloat16_the_losses_are_those_of_float32(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", [])
    plain = losses(tmp_path / "plain", "--precision", "float32")
    quick = losses(tmp_path / "quick", "--compile", "--grad-checkpoint")
    assert len(plain) == 3 and quick == pytest.approx(plain, rel=0.02)

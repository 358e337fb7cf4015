"""A GPU says what the CPU says: velocity, gradients, samples, and a training by the command."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import train
from model import ModelConfig
from runtime import cli
from studies import bench

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CONFIG = ModelConfig(frames=4, size=16, patch=(1, 4, 4), dim=64, depth=2, heads=2)  # 72 tokens


def inputs():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, *CONFIG.video_shape, generator=rng)
    y = torch.randint(CONFIG.vocab, (3, CONFIG.max_text), generator=rng)
    return x, torch.tensor([0.2, 0.5, 0.9]), y


@pytest.mark.parametrize("attention", ["full", "tile:1,4,4/3,1,1"])
def test_velocity_and_gradients(attention):
    results = {}
    for device in ("cpu", "cuda"):
        network = bench.awake(replace(CONFIG, attention=attention), torch.device("cpu")).to(device)
        v = network(*(x.to(device) for x in inputs()))
        gradients = torch.autograd.grad(v.square().mean(), list(network.parameters()))
        results[device] = [x.cpu() for x in (v, *gradients)]
    for cpu, cuda in zip(results["cpu"], results["cuda"]):
        assert (cpu - cuda).abs().max() <= 1e-4 * max(cpu.abs().max(), 1e-3)


def test_compiled_checkpointed_and_in_bfloat16_losses_are_those_of_float32(tmp_path, monkeypatch):
    def losses(name, *flags):
        shared = "train.py --algo pretrain --steps 3 --batch 4 --eval-prompts 1 --device cuda"
        monkeypatch.setattr(sys, "argv", [*shared.split(), f"--out={tmp_path / name}", *flags])
        cli.run(train.main)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    plain = losses("plain", "--precision=float32")
    quick = losses("quick", "--compile", "--grad-checkpoint")
    assert len(plain) == 3 and quick == pytest.approx(plain, rel=0.02)

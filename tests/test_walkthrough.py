"""The numbers that docs/walkthrough.md lets its reader check by hand."""

import pytest
import torch

from flow import interpolate
from flow_dpo import flow_dpo_loss
from flow_rwr import rwr_weights
from nrg import guide
from reward import btt_probabilities
from sample import sample


def one(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_flow_matching():
    x0, x1, t = one(2)[:, None], one(-1)[:, None], one(0.25)
    x_t, v = interpolate(x0, x1, t), x1 - x0
    assert x_t.item() == 1.25 and (x_t - 0.25 * v).item() == 2


def test_bradley_terry_with_ties():
    a, b, tie = btt_probabilities(one(1))
    assert a.item() == pytest.approx(0.352, abs=5e-4)
    assert b.item() == pytest.approx(0.069, abs=5e-4)
    assert tie.item() == pytest.approx(0.579, abs=5e-4)


def test_flow_dpo():
    at_start, _ = flow_dpo_loss(one(0.3), one(0.6), one(0.3), one(0.6), one(0.5), beta=10)
    later, _ = flow_dpo_loss(one(0.3), one(0.6), one(0.4), one(0.5), one(0.5), beta=10)
    assert at_start.item() == pytest.approx(0.693, abs=5e-4)
    assert later.item() == pytest.approx(0.313, abs=5e-4)


def test_flow_rwr():
    assert rwr_weights(one(0, 1)).tolist() == pytest.approx([0.538, 1.462], abs=5e-4)


def test_flow_nrg():
    def value(x_t, t, y):  # E[x0 | x_t] for data N(0, 1)
        t = t[:, None]
        return (1 - t) / ((1 - t) ** 2 + t**2) * x_t

    velocity = guide(value, (1.0,))(one(3)[:, None], one(0.7)[:, None], one(0.5), None)
    assert velocity.item() == pytest.approx(2)


def test_sampling():
    x0, x1 = torch.randn(2, 1, 3, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(1, 1, dtype=torch.int64)
    clip = sample(lambda x_t, t, y: x1 - x0, x1, y, steps=1)
    assert torch.allclose(clip, x0, atol=1e-6)

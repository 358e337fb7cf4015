"""Flow-DPO: the loss by hand, and the step on a small model."""

import copy
import math

import pytest
import torch

from flow_dpo import flow_dpo_loss, flow_dpo_step
from model import ModelConfig, VideoTransformer


def numbers(*values):
    return [torch.tensor([value]) for value in values]


def test_loss_and_gradient_of_a_hand_computed_pair():
    # (err - ref): winner .2 - .5 = -.3, loser .7 - .6 = +.1; bracket -.4; logit = beta / 2 * .4 = 2
    # at beta 10
    err_w, err_l, ref_w, ref_l, t = numbers(0.2, 0.7, 0.5, 0.6, 0.5)
    err_w.requires_grad_()
    err_l.requires_grad_()
    loss, logs = flow_dpo_loss(err_w, err_l, ref_w, ref_l, t, beta=10.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.0)), rel=1e-5)
    assert logs["margin"] == pytest.approx(0.4, rel=1e-5) and logs["accuracy"] == 1.0
    # dL/d err_w = beta / 2 sigma(-logit) = -dL/d err_l, here 5 sigma(-2)
    loss.backward()
    expected = 5 / (1 + math.exp(2.0))
    assert err_w.grad.item() == pytest.approx(expected, rel=1e-5)
    assert err_l.grad.item() == pytest.approx(-expected, rel=1e-5)
    # with (1 - t)^2 at t = 1/2 the logit is a quarter of that
    loss, _ = flow_dpo_loss(err_w, err_l, ref_w, ref_l, t, beta=10.0, schedule="(1-t)^2")
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-5)
    # turned round, the logit is -2
    loss, logs = flow_dpo_loss(err_l, err_w, ref_l, ref_w, t, beta=10.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2.0)), rel=1e-5)
    assert logs["accuracy"] == 0.0
    with pytest.raises(ValueError, match="linear"):
        flow_dpo_loss(err_w, err_l, ref_w, ref_l, t, 1.0, "linear")


def test_logs_hold_every_figure_by_quarter_of_t():
    torch.manual_seed(0)
    sizes = {"frames": 4, "size": 16, "patch": (2, 8, 8), "dim": 32, "depth": 2, "heads": 2}
    reference = VideoTransformer(ModelConfig(**sizes, vocab=8, max_text=3))
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.patch_out.bias += 0.1  # now the two differ
    winner, loser, noise = torch.randn(3, 16, *policy.config.video_shape)
    y, t = torch.randint(0, 8, (16, 3)), torch.rand(16)
    _, logs = flow_dpo_step(policy, reference, winner, loser, y, t, noise, 10.0)
    counts = torch.histc(t, 4, 0, 1)
    assert (counts > 0).all() and logs["drift"] > 0
    for name in ("drift", "margin", "accuracy", "error_w", "ref_error_l"):
        parts = torch.tensor([logs[f"{name}/t{i}"] for i in range(4)])
        assert (parts * counts).sum().item() / 16 == pytest.approx(logs[name], rel=1e-4, abs=1e-6)
    # v = (x_t - x0_hat) / t: a constant 0.1 in x0_hat is a drift of (0.1 / t)^2, with t at least
    # the floor .05
    late = t[t >= 0.75]
    assert logs["drift/t3"] == pytest.approx((0.1 / late).square().mean().item(), rel=1e-3)

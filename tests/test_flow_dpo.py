"""Flow-DPO: the loss by hand, and the step on a small model."""

import copy
import math

import pytest
import torch

from flow_dpo import flow_dpo_loss, flow_dpo_step
from lora import freeze_trunk
from model import ModelConfig, VideoTransformer, share_trunk


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


@pytest.fixture
def models():
    torch.manual_seed(0)
    sizes = {"frames": 4, "size": 16, "patch": (2, 8, 8), "dim": 32, "depth": 2, "heads": 2}
    policy = VideoTransformer(ModelConfig(**sizes, vocab=8, max_text=3))
    for parameter in policy.parameters():  # zero-initialised layers would hide most gradients
        torch.nn.init.normal_(parameter, std=0.05)
    return policy, copy.deepcopy(policy).requires_grad_(False)


def pair(config, count=4):
    """Winners, losers, prompts, times and noise."""
    rng = torch.Generator().manual_seed(1)
    win, lose, noise = torch.randn(3, count, *config.video_shape, generator=rng)
    y = torch.randint(0, 8, (count, 3), generator=rng)
    return win, lose, y, torch.rand(count, generator=rng), noise


def test_first_step_is_ln_2_in_train_mode_and_only_the_policy_gets_a_gradient(models):
    policy, reference = models
    policy.train()
    loss, logs = flow_dpo_step(policy, reference, *pair(policy.config), 500.0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and logs["accuracy"] == 0.5
    loss.backward()
    for name, value in policy.named_parameters():
        assert "words" in name or value.grad.abs().sum() > 0
    assert all(p.grad is None for p in reference.parameters())


def test_winner_and_loser_share_noise_time_and_prompt(models):
    policy, _ = models
    seen = []

    def spy(x_t, t, y):
        seen.append((x_t, t, y))
        return torch.zeros_like(x_t)

    w, _, *rest = pair(policy.config)
    flow_dpo_step(spy, spy, w, w, *rest, 1.0)
    for x_t, t, y in seen:  # the same clip as winner and loser: then the two halves must be equal
        assert all(torch.equal(*part.chunk(2)) for part in (x_t, t, y))
    assert torch.equal(seen[0][0], seen[1][0])


def test_logs_hold_every_figure_by_quarter_of_t(models):
    policy, reference = models
    with torch.no_grad():
        policy.patch_out.bias += 0.1  # now the two differ
    batch = pair(policy.config, 16)
    t = batch[3]
    _, logs = flow_dpo_step(policy, reference, *batch, 10.0)
    counts = torch.histc(t, 4, 0, 1)
    assert (counts > 0).all() and logs["drift"] > 0
    for name in ("drift", "margin", "accuracy", "error_w", "ref_error_l"):
        parts = torch.tensor([logs[f"{name}/t{i}"] for i in range(4)])
        assert (parts * counts).sum().item() / 16 == pytest.approx(logs[name], rel=1e-4, abs=1e-6)
    # v = (x_t - x0_hat) / t: a constant 0.1 in x0_hat is a drift of (0.1 / t)^2, with t at least
    # the floor .05
    late = t[t >= 0.75]
    assert logs["drift/t3"] == pytest.approx((0.1 / late).square().mean().item(), rel=1e-3)


def test_one_shared_trunk_gives_the_same_loss_and_gradients(models):
    policy, reference = models
    freeze_trunk(policy, 1)
    with torch.no_grad():
        policy.blocks[1].mlp[0].weight += 0.02
    results = []
    for shared in (None, share_trunk(policy, reference, 1)):
        policy.zero_grad()
        batch = pair(policy.config)
        loss, logs = flow_dpo_step(policy, reference, *batch, 50.0, shared_forward=shared)
        loss.backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
        results.append((loss.item(), logs["drift"], gradients))
    (loss, drift, gradients), (shared_loss, shared_drift, shared_gradients) = results
    assert loss == pytest.approx(shared_loss, abs=1e-6)
    assert drift == pytest.approx(shared_drift, rel=1e-5) and drift > 0
    for gradient, shared_gradient in zip(gradients, shared_gradients, strict=True):
        assert torch.allclose(gradient, shared_gradient, atol=1e-6)

"""Flow-DPO: the loss by hand, and the step on a small model."""

import copy
import math

import pytest
import torch

from data import draw_noise, step_rng
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


def test_noise_error_is_the_velocity_error_times_one_minus_t_squared():
    # Lemma B.1: noise = x_t + (1 - t) v, for the true and for any predicted velocity
    torch.manual_seed(0)
    x0, x1, guess = torch.randn(3, 5, 7, dtype=torch.float64)
    for t in (0.0, 0.3, 1.0):
        x_t = (1 - t) * x0 + t * x1
        noise_error = (x1 - (x_t + (1 - t) * guess)).square().sum()
        velocity_error = (x1 - x0 - guess).square().sum()
        assert noise_error.item() == pytest.approx((1 - t) ** 2 * velocity_error.item(), abs=1e-12)


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


def test_training_raises_the_margin(models):
    policy, reference = models
    batch = pair(policy.config)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(40):
        loss, logs = flow_dpo_step(policy, reference, *batch, 20.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 and logs["margin"] > 0 and logs["accuracy"] == 1.0
    # relative to the reference, the winner's error fell by more than the loser's
    assert logs["error_w"] - logs["ref_error_w"] < logs["error_l"] - logs["ref_error_l"]


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


class Small(torch.nn.Module):
    """A velocity model of two layers on points (B, 4)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = torch.nn.Linear(5, 32), torch.nn.GELU(), torch.nn.Linear(32, 4)
        self.net = torch.nn.Sequential(*layers)

    def forward(self, x_t, t, y):
        return self.net(torch.cat((x_t, t[:, None]), 1))


def drift_after_training(beta, schedule):
    """Drift in the four quarters of t, after DPO on pairs of which a quarter is labelled the wrong
    way."""
    reference = Small().requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    one, other = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    x0_w, x0_l = torch.cat((one, one, one, other)), torch.cat((other, other, other, one))
    y = torch.zeros(64, 1, dtype=torch.int64)
    batch = policy, reference, x0_w.repeat(4, 1), x0_l.repeat(4, 1), y
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    for step in range(200):
        noise = draw_noise(64, (4,), 1.0, step_rng(0, step))
        loss, _ = flow_dpo_step(*batch, **noise, beta=beta, schedule=schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drift = torch.zeros(4)
    for step in range(10):  # judged at the same times and noises for all
        noise = draw_noise(64, (4,), 1.0, step_rng(1, step))
        _, logs = flow_dpo_step(*batch, **noise, beta=beta, schedule=schedule)
        drift += torch.tensor([logs[f"drift/t{i}"] for i in range(4)]) / 10
    return drift


@pytest.mark.parametrize("schedule", ["constant", "(1-t)^2"])
def test_a_larger_beta_stays_closer_to_the_reference(schedule):
    # with a quarter of the labels wrong the best logit is log 3 = beta_t / 2 * margin, whatever
    # beta is: ten times the beta is a tenth of the margin, and a margin that is linear in a small
    # change of v is a hundredth of the drift
    low, middle, high = (drift_after_training(beta, schedule).sum() for beta in (10.0, 31.6, 100.0))
    assert low > 4 * middle > 4 * 4 * high


def test_one_minus_t_squared_lets_the_policy_go_where_the_noise_is():
    # the same best logit needs the margin 2 log 3 / (beta (1 - t)^2): much at high noise, little at
    # low
    constant, scheduled = (drift_after_training(30.0, s) for s in ("constant", "(1-t)^2"))
    assert constant[3] < 2 * constant[0] and scheduled[3] > 5 * scheduled[0]

"""Flow-DPO: the loss by hand, and the step on a small model."""

import copy
import math

import pytest
import torch

from data import step_rng
from flow_dpo import flow_dpo_loss, flow_dpo_step
from model import ModelConfig, VideoTransformer

HALF = torch.tensor([0.5, 0.5])


def test_loss_of_a_hand_computed_pair():
    # (err - ref): winner .2 - .5 = -.3, loser .7 - .6 = +.1; bracket -.4; logit = beta / 2 * .4 = 2 at beta 10
    one = [torch.tensor([v]) for v in (0.2, 0.7, 0.5, 0.6)]
    loss, logs = flow_dpo_loss(*one, torch.tensor([0.5]), beta=10.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.0)), rel=1e-5)
    assert logs["margin"] == pytest.approx(0.4, rel=1e-5) and logs["accuracy"] == 1.0
    # with (1 - t)^2 at t = 1/2 the logit is a quarter of that
    loss, _ = flow_dpo_loss(*one, torch.tensor([0.5]), beta=10.0, schedule="(1-t)^2")
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)), rel=1e-5)


def test_gradient_of_a_hand_computed_pair():
    # dL/d err_w = beta / 2 sigma(-logit), dL/d err_l = -beta / 2 sigma(-logit), here 5 sigma(-2)
    err_w, err_l = torch.tensor([0.2], requires_grad=True), torch.tensor([0.7], requires_grad=True)
    loss, _ = flow_dpo_loss(err_w, err_l, torch.tensor([0.5]), torch.tensor([0.6]), torch.tensor([0.5]), beta=10.0)
    loss.backward()
    expected = 5 / (1 + math.exp(2.0))
    assert err_w.grad.item() == pytest.approx(expected, rel=1e-5)
    assert err_l.grad.item() == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "(1-t)^2"])
def test_policy_equal_to_reference_gives_ln_2(schedule):
    err = torch.tensor([0.3, 1.7])
    loss, logs = flow_dpo_loss(err, err + 1, err, err + 1, HALF, 500.0, schedule)
    assert loss.item() == pytest.approx(math.log(2)) and logs["accuracy"] == 0.5


def test_swapping_the_pair_turns_the_logit():
    win, lose, ref_w, ref_l = (torch.tensor([v]) for v in (0.4, 0.9, 0.5, 0.8))
    t = torch.tensor([0.2])
    one, other = flow_dpo_loss(win, lose, ref_w, ref_l, t, 4.0), flow_dpo_loss(lose, win, ref_l, ref_w, t, 4.0)
    assert one[1]["margin"] == pytest.approx(-other[1]["margin"]) and one[1]["margin"] > 0
    # -log sigma(z) and -log sigma(-z) differ by z; z = 4 / 2 * .2
    assert other[0].item() - one[0].item() == pytest.approx(0.4, rel=1e-4)


def test_a_shift_common_to_both_models_changes_nothing():
    errors = [torch.tensor([v]) for v in (0.4, 0.9, 0.5, 0.8)]
    shifted = [e + shift for e, shift in zip(errors, (3, 5, 3, 5))]
    t = torch.tensor([0.2])
    assert flow_dpo_loss(*errors, t, 4.0)[0].item() == pytest.approx(
        flow_dpo_loss(*shifted, t, 4.0)[0].item(), rel=1e-5
    )


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="linear"):
        flow_dpo_loss(HALF, HALF, HALF, HALF, HALF, 1.0, "linear")


def test_noise_error_is_the_velocity_error_times_one_minus_t_squared():
    # Lemma B.1: noise = x_t + (1 - t) v, for the true and for any predicted velocity
    torch.manual_seed(0)
    x0, x1, guess = torch.randn(3, 5, 7, dtype=torch.float64)
    for t in (0.0, 0.3, 1.0):
        x_t = (1 - t) * x0 + t * x1
        noise_error = (x1 - (x_t + (1 - t) * guess)).square().sum()
        assert noise_error.item() == pytest.approx((1 - t) ** 2 * (x1 - x0 - guess).square().sum().item(), abs=1e-12)


@pytest.fixture
def models():
    torch.manual_seed(0)
    config = ModelConfig(frames=4, size=16, patch=(2, 8, 8), dim=32, depth=2, heads=2, vocab=8, max_text=3)
    policy = VideoTransformer(config)
    for parameter in policy.parameters():  # zero-initialised layers would hide most gradients
        torch.nn.init.normal_(parameter, std=0.05)
    return policy, copy.deepcopy(policy).requires_grad_(False)


def pair(config, count=4):
    rng = torch.Generator().manual_seed(1)
    win, lose = torch.randn(2, count, *config.video_shape, generator=rng)
    return win, lose, torch.randint(0, 8, (count, 3), generator=rng)


def test_first_step_is_ln_2_in_train_mode_and_only_the_policy_gets_a_gradient(models):
    policy, reference = models
    policy.train()
    loss, logs = flow_dpo_step(policy, reference, *pair(policy.config), 500.0, step_rng(0, 0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6) and logs["accuracy"] == 0.5
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in policy.named_parameters() if "words" not in name
    )
    assert all(p.grad is None for p in reference.parameters())


def test_training_raises_the_margin_and_leaves_the_reference_alone(models):
    policy, reference = models
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    batch = pair(policy.config)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3, weight_decay=0.0)
    for _ in range(40):
        loss, logs = flow_dpo_step(policy, reference, *batch, 20.0, step_rng(0, 0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 and logs["margin"] > 0 and logs["accuracy"] == 1.0
    # relative to the reference, the winner's error fell by more than the loser's
    assert logs["error_w"] - logs["ref_error_w"] < logs["error_l"] - logs["ref_error_l"]
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())


def test_winner_and_loser_share_noise_time_and_prompt(models):
    policy, _ = models
    seen = []

    def spy(x_t, t, y):
        seen.append((x_t, t, y))
        return torch.zeros_like(x_t)

    w, _, y = pair(policy.config)
    flow_dpo_step(spy, spy, w, w, y, 1.0, step_rng(0, 0))
    for x_t, t, y in seen:  # the same clip as winner and loser: then the two halves must be equal
        assert all(torch.equal(*part.chunk(2)) for part in (x_t, t, y))
    assert torch.equal(seen[0][0], seen[1][0])

"""Flow-GRPO: the SDE keeps the flow's marginals, and the loss is the published formula."""

import math

import pytest
import torch
import wired
from torch.distributions import Normal, kl_divergence

from online.flow_grpo import (
    flow_grpo_loss,
    flow_grpo_step,
    group_advantage,
    sample_sde,
    step_distribution,
)
from sample import sample

tiny = wired.tiny

MEAN, STD = 0.8, 0.3  # of Gaussian data


def exact_velocity(x_t, t, y):
    """E[x1 - x0 | x_t] for data N(MEAN, STD^2): x0, x1 and x_t are jointly Gaussian."""
    t = t[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    centred = x_t - (1 - t) * MEAN
    x0 = MEAN + (1 - t) * STD**2 / variance * centred
    x1 = t / variance * centred
    return x1 - x0


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.0])
def test_the_sde_keeps_the_marginals_of_the_flow(noise_level):
    x1, y = torch.randn(20_000, 1, generator=rng()), torch.zeros(20_000, 1)
    states, times = sample_sde(exact_velocity, x1, y, 300, rng(1), noise_level)
    for i in (100, 200, 270, 300):  # mean within 4 standard errors and the bias of 300 Euler steps
        t = times[i].item()
        std = math.sqrt((1 - t) ** 2 * STD**2 + t**2)
        assert states[i].mean().item() == pytest.approx((1 - t) * MEAN, abs=0.02)
        assert states[i].std().item() == pytest.approx(std, rel=0.03)
    if noise_level == 0:
        assert torch.allclose(states[-1], sample(exact_velocity, x1, y, 300), atol=1e-4)


def test_a_step_by_hand():
    # t .5 -> .4, a = 1: sigma = 1; drift = 2 + 1 / (2 * .5) * (3 + .5 * 2) = 6;
    # mean 3 - .1 * 6, standard deviation sqrt(.1)
    one = torch.ones(1, 1)
    mean, std = step_distribution(2 * one, 3 * one, torch.tensor([0.5]), torch.tensor([0.4]), 1.0)
    assert mean.item() == pytest.approx(2.4) and std.item() == pytest.approx(0.1**0.5)


def test_advantages_by_hand():
    advantage = group_advantage(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    expected = torch.tensor(
        [[-(1.5**0.5), 0, 1.5**0.5], [0, 0, 0]]
    )  # standard deviation sqrt(2 / 3)
    assert torch.allclose(advantage, expected)
    random = group_advantage(torch.randn(7, 5, generator=rng()))
    assert torch.allclose(random.sum(1), torch.zeros(7), atol=1e-5)


def steps_of(model, advantage):
    """Arguments of flow_grpo_step, after the models: a second step of clips of two numbers."""
    x1, y = torch.randn(4, 2, generator=rng(2)), torch.zeros(4, 1)
    states, times = sample_sde(model, x1, y, 5, rng(3))
    t, t_next = times[1].expand(4), times[2].expand(4)
    return states[1], states[2], y, t, t_next, advantage


def linear(weight):
    return lambda x_t, t, y: x_t @ weight.T + t[:, None]


def test_before_the_first_update_the_ratio_is_one():
    weight = torch.randn(2, 2, generator=rng(4))
    advantage = torch.tensor([1.0, -1.0, 2.0, 0.5])
    batch = steps_of(linear(weight), advantage)
    loss, logs = flow_grpo_step(*[linear(weight)] * 3, *batch, 0.1, 3.0)
    assert loss.item() == -advantage.mean().item()  # exactly
    assert logs["clipped"] == logs["kl"] == logs["drift"] == 0


def test_equal_rewards_give_no_gradient():
    weight = torch.randn(2, 2, generator=rng(4))
    batch = steps_of(linear(weight), group_advantage(torch.full((1, 4), 0.3)).flatten())
    policy = (weight + 0.1).requires_grad_()
    flow_grpo_step(linear(policy), linear(weight), linear(weight), *batch, 0.1, 0.0)[0].backward()
    assert torch.equal(policy.grad, torch.zeros(2, 2))


def test_loss_and_gradient_are_those_of_the_published_formula():
    old, advantage = torch.randn(2, 2, generator=rng(4)), torch.randn(4, generator=rng(5))
    batch = steps_of(linear(old), advantage)
    x_t, x_next, y, t, t_next, _ = batch
    first = old + 0.2  # the reference
    start = old + 0.3 * torch.randn(2, 2, generator=rng(6))
    clip, kl_weight, a = 0.05, 0.3, 0.7

    def published(weight):
        sigma = (a * (t / (1 - t)).sqrt())[:, None]
        dt = (t - t_next)[:, None]

        def transition(model):
            v = model(x_t, t, y)
            drift = v + sigma**2 / (2 * t[:, None]) * (x_t + (1 - t[:, None]) * v)
            return Normal(x_t - drift * dt, sigma * dt.sqrt())

        new, before = transition(linear(weight)), transition(linear(old))
        ratio = (new.log_prob(x_next) - before.log_prob(x_next)).mean(1).exp()
        objective = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        kl = kl_divergence(new, transition(linear(first))).mean(1)
        return (kl_weight * kl - objective).mean()

    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    loss, logs = flow_grpo_step(linear(ours), linear(old), linear(first), *batch, clip, kl_weight)
    loss.backward()
    expected = published(theirs)
    expected.backward()
    assert 0 < logs["clipped"] < 1  # both branches of the minimum are in the batch
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4)


def test_clipping_by_hand():
    # ratios 1.5, 0.5 with A = 1, -1: clipped to 1.1 and 0.9. The minimum takes 1.1 and -0.9 (both
    # clipped: no gradient); with A = -1, 1 it takes -1.5 and 0.5
    log_ratio = torch.tensor([1.5, 0.5]).log().requires_grad_()
    none, kl = torch.zeros(2), torch.tensor([0.2, 0.4])
    loss, _ = flow_grpo_loss(log_ratio, torch.tensor([1.0, -1.0]), none, 0.1, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(-0.1) and torch.equal(log_ratio.grad, none)
    loss, logs = flow_grpo_loss(log_ratio, torch.tensor([-1.0, 1.0]), kl, 0.1, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.1)  # (1.5 - 0.5) / 2 + 2 * 0.3
    assert torch.allclose(log_ratio.grad, torch.tensor([0.75, -0.25]))
    assert logs["kl"] == pytest.approx(0.3) and logs["clipped"] == 1


def test_rounds_train_on_the_steps_that_sampled_their_clips(tiny):
    """A batch holds neighbours on one path of the SDE; before the first update the ratio is 1."""
    flags = ["--clips=4", "--steps=4", "--rounds=2", "--sde-steps=5", "--freeze=0"]
    _, task = tiny("--algo=grpo", *flags)
    batch = task.batch(0, slice(0, 8))
    assert batch["x_t"].shape[0] == 16 and (batch["t_next"] < batch["t"]).all()
    mean, std = step_distribution(
        task.model(batch["x_t"], batch["t"], batch["y"]), batch["x_t"], batch["t"], batch["t_next"]
    )
    noise = (batch["x_next"] - mean) / std
    assert noise.flatten(1).std(1).sub(1).abs().max() < 0.05  # 3,072 numbers: 4 standard errors
    loss, logs = task.loss(batch)
    assert loss.item() == pytest.approx(-batch["advantage"].mean().item(), abs=1e-6)
    assert logs["kl"] == logs["drift"] == 0 and logs["round"] == 0


@torch.no_grad()
def brightness(policy):
    """The mean of x0_hat at t = 1 over four prompts."""
    x1 = torch.randn(4, *wired.CONFIG.video_shape, generator=rng(7))
    y = wired.Vocabulary().encode(["a red circle moving left"] * 4, wired.CONFIG.max_text)
    return (x1 - policy(x1, torch.ones(4), y)).mean().item()


def test_training_goes_where_the_reward_is(tiny):
    flags = [
        "--clips=8",
        "--steps=40",
        "--rounds=4",
        "--sde-steps=5",
        "--freeze=0",
        "--align=1,0,0",
    ]
    gains = []
    for align in ("1,0,0", "-1,0,0"):
        args, task = tiny("--algo=grpo", *flags, f"--align={align}", "--clip-range=0.01")
        before = brightness(task.model)
        gains.append(brightness(wired.trained(args, task)) - before)
    assert gains[0] > 0.02 > -0.02 > gains[1]

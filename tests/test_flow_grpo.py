"""Flow-GRPO: the SDE keeps the flow's marginals, and the loss is the published formula."""

import math

import pytest
import torch
import wired
from torch.distributions import Normal, kl_divergence

from online import rounds
from online.flow_grpo import flow_grpo_step, group_advantage, sample_sde, step_distribution
from real_data.video import to_video
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


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_the_sde_keeps_the_marginals_of_the_flow(noise_level):
    x1, y = torch.randn(20_000, 1, generator=rng()), torch.zeros(20_000, 1)
    states = sample_sde(exact_velocity, x1, y, 300, rng(1), noise_level)  # (20,000, 301, 1)
    for i in (100, 200, 270, 300):  # mean within 4 standard errors and the bias of 300 Euler steps
        u = 1 - i / 300
        t = 4 * u / (1 + 3 * u)
        std = math.sqrt((1 - t) ** 2 * STD**2 + t**2)
        assert states[:, i].mean().item() == pytest.approx((1 - t) * MEAN, abs=0.02)
        assert states[:, i].std().item() == pytest.approx(std, rel=0.03)
    if noise_level == 0:
        assert torch.allclose(states[:, -1], sample(exact_velocity, x1, y, 300), atol=1e-4)


def linear(weight):
    return lambda x_t, t, y: x_t @ weight.T + t[:, None]


def test_advantages_by_hand():
    # the standard deviation of 1, 2, 3 is sqrt(2 / 3)
    advantage = group_advantage(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert torch.allclose(advantage, torch.tensor([[-(1.5**0.5), 0, 1.5**0.5], [0, 0, 0]]))


def test_loss_and_gradient_are_those_of_the_published_formula():
    old, advantage = torch.randn(2, 2, generator=rng(4)), torch.randn(4, generator=rng(5))
    reference, start = old + 0.2, old + 0.3 * torch.randn(2, 2, generator=rng(6))
    # a second step of clips of two numbers
    x1, y = torch.randn(4, 2, generator=rng(2)), torch.zeros(4, 1)
    states = sample_sde(linear(old), x1, y, 5, rng(3), 0.7)
    x_t, x_next = states[:, 1], states[:, 2]
    t, t_next = (torch.full((4,), 4 * u / (1 + 3 * u)) for u in (0.8, 0.6))
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
        kl = kl_divergence(new, transition(linear(reference))).mean(1)
        return (kl_weight * kl - objective).mean(), kl.mean()

    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    models = linear(ours), linear(old), linear(reference)
    batch = x_t, x_next, y, t, t_next, advantage
    loss, logs = flow_grpo_step(*models, *batch, clip, kl_weight, a)
    loss.backward()
    expected, kl = published(theirs)
    expected.backward()
    assert 0 < logs["clipped"] < 1  # both branches of the minimum are in the batch
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logs["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4)


def test_rounds_train_on_the_steps_that_sampled_their_clips(tiny):
    """A batch holds neighbours on one path of the SDE; before the first update the ratio is 1."""
    flags = ["--clips=4", "--steps=4", "--rounds=2", "--sde-steps=5", "--noise-level=0.5", "--kl=2"]
    settings, task = tiny("--algo=grpo", "--freeze=0", *flags)
    batch = task.batch(0, slice(0, 8))
    states = torch.load(settings.out / "round.pt", weights_only=True)["states"]  # (P, n, K + 1, ..)
    assert (states[:, 1:, 0] == states[:, :1, 0]).all()  # one noise for the clips of a prompt
    assert (states[1:, 0, 0] != states[:-1, 0, 0]).flatten(1).any(1).all()
    assert (states[:, 1:, 1] != states[:, :1, 1]).flatten(2).any(2).all()
    assert batch["x_t"].shape[0] == 16 and (batch["t_next"] < batch["t"]).all()
    x_t, t = batch["x_t"], batch["t"]
    mean, std = step_distribution(task.model(x_t, t, batch["y"]), x_t, t, batch["t_next"], 0.5)
    noise = (batch["x_next"] - mean) / std
    assert noise.flatten(1).std(1).sub(1).abs().max() < 0.05  # 3,072 numbers: 4 standard errors
    loss, logs = task.loss(batch)
    assert loss.item() == pytest.approx(-batch["advantage"].mean().item(), abs=1e-6)
    assert logs["kl"] == logs["drift"] == 0 and logs["round"] == 0
    wired.noticeable(task.model)
    loss, logs = task.loss(batch | {"advantage": torch.zeros(16)})
    assert loss.item() == pytest.approx(2 * logs["kl"], rel=1e-5) and logs["kl"] > 1e-7
    state = torch.load(settings.out / "round.pt", weights_only=True)
    error = state["states"][:, :, -1].float().clamp(-1, 1) - to_video(state["clips"])
    assert error.abs().max() < 0.006  # bytes and float16 of the path's end


def test_training_goes_where_the_reward_is(tiny, monkeypatch):
    monkeypatch.setattr(rounds, "MOST_PROMPTS", 18)
    flags = "--algo=grpo --clips=8 --steps=20 --rounds=2 --sde-steps=5 --freeze=0 --clip-range=0.01"
    gains = []
    for align in ("1,0,0", "-1,0,0"):
        settings, task = tiny(flags, f"--align={align}", "--lr=0.006")
        before = wired.brightness(task.model)
        gains.append(wired.brightness(wired.trained(settings, task)) - before)
    assert gains[0] > 0.02 > -0.02 > gains[1]

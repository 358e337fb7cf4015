"""Flow matching and the sampler, against values derived by hand."""

import pytest
import torch

from data import step_rng
from flow import flow_error, interpolate, shift_time
from sample import sample, sample_many

X0 = torch.tensor([[2.0, -4.0]])
X1 = torch.tensor([[6.0, 8.0]])


def still(x, t, y):
    return torch.zeros_like(x)


def test_path_runs_from_data_to_noise_and_its_error_is_a_mean_over_elements():
    for t, x_t in ((0.0, [2.0, -4.0]), (0.5, [4.0, 2.0]), (1.0, [6.0, 8.0])):
        assert interpolate(X0, X1, torch.tensor([t])).tolist() == [x_t]
    # v = x1 - x0 = (4, 12); a model that says 0 errs by (16 + 144) / 2 = 80
    t = torch.tensor([0.3])
    assert flow_error(still, X0, X1, t, None).tolist() == [80.0]
    assert flow_error(lambda x, t, y: X1 - X0, X0, X1, t, None).tolist() == [0.0]


def test_batches_of_samples_take_their_own_prompts():
    y = torch.arange(6.0)[:, None]
    clips = sample_many(lambda x, t, y: y, torch.zeros(6, 1), y, batch=2)
    assert clips.flatten().tolist() == [0, -1, -2, -3, -4, -5]


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_sampler_turns_noise_into_a_known_gaussian(shift):
    mean, std = 1.5, 0.4

    def velocity(x, t, y):  # E[x1 - x0 | x_t] for x0 ~ N(mean, std^2): joint Gaussians
        t = t[:, None]
        surplus = (x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
        return t * surplus - (mean + (1 - t) * std**2 * surplus)

    x1 = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    x0 = sample(velocity, x1, torch.zeros(5000, 1), steps=400, shift=shift)
    # the flow is linear in x1: compare with what these very draws should become
    assert x0.mean().item() == pytest.approx(mean + std * x1.mean().item(), abs=0.01)
    assert x0.std().item() == pytest.approx(std * x1.std().item(), rel=0.02)


def test_guidance_comes_after_cfg_and_cfg_one_needs_no_second_call():
    calls, seen = [], []

    def model(x, t, y):
        calls.append(y)
        return torch.full_like(x, 3.0) if y.sum() else torch.full_like(x, 1.0)

    def guidance(v, x, t, y):
        seen.append(v)
        return v - 1

    y = torch.ones(1, 2, dtype=torch.int64)
    out = sample(model, torch.zeros(1, 1), y, steps=1, cfg=2.0, guidance=guidance)
    assert seen[0].item() == 5.0  # 1 + 2 (3 - 1)
    assert out.item() == -4.0  # x1 - (5 - 1)
    calls.clear()
    sample(model, torch.zeros(1, 1), y, steps=3)
    assert len(calls) == 3


def test_shift_moves_times_to_noise_and_keeps_the_ends():
    times = shift_time(torch.tensor([0.0, 0.5, 1.0]), 4.0)
    assert times.tolist() == pytest.approx([0.0, 0.8, 1.0])  # 4/2 / (1 + 3/2)
    assert shift_time(torch.tensor([0.25]), 1.0).item() == 0.25


def test_a_step_has_its_own_randomness():
    # what every result stands on: 2 (5 * 1,000,003 + 7) + 1
    assert step_rng(5, 7).initial_seed() == 10_000_045
    steps = (-(10**9), -1_000_003, -500_000, -1, 0, 250_000, 500_003, 1_000_003, 10**9)
    seeds = {step_rng(seed, step).initial_seed() for seed in (0, 1, 2, 2**31 - 1) for step in steps}
    assert len(seeds) == 4 * len(steps)

"""Flow-NRG's guidance: against closed forms, and what it must leave alone."""

import pytest
import torch

import evaluate_unified
from nrg import guide
from sample import sample


def velocity(x_t, t, y):
    """Exact for data N(0, I): E[x1 - x0 | x_t] = (t - (1 - t)) x_t / (t^2 + (1 - t)^2)."""
    t = t[:, None]
    return (2 * t - 1) * x_t / (t**2 + (1 - t) ** 2)


def value_of(k):
    """The exact value function of r(x0) = k x0 up to terms free of x_t: k E[x0 | x_t]."""

    def value(x_t, t, y):
        mean = (1 - t) / (t**2 + (1 - t) ** 2)
        return ((x_t @ k) * mean)[:, None]

    return value


@pytest.mark.parametrize("k", [torch.tensor([1.5]), torch.linspace(-2, 2, 16)], ids=["1-D", "16-D"])
def test_the_exact_value_function_reaches_the_tilted_mean(k):
    x1 = torch.randn(4000, len(k), generator=torch.Generator().manual_seed(0))
    x1 = (x1 - x1.mean(0)) / x1.std(0)  # without sampling error, which would be 1.6 %
    y = torch.zeros(4000, 1, dtype=torch.int64)
    for scale in (0.5, 1.0):
        x0 = sample(velocity, x1, y, steps=400, shift=1.0, guidance=guide(value_of(k), [1.0], scale))
        # N(0, I) tilted by exp(scale k x) is N(scale k, I)
        assert (x0.mean(0) - scale * k).abs().max() <= 0.02 * (scale * k).abs().max()
        assert (x0.std(0) - 1).abs().max() < 0.02


def test_weights_add_up_the_rewards():
    x, t, y = torch.randn(3, 2), torch.full((3,), 0.5), None

    def reward(x_t, t, y):
        return torch.stack((x_t[:, 0], 10 * x_t[:, 1], x_t.sum(1)), 1)

    v = guide(reward, [1.0, -0.5, 2.0], scale=3.0)(torch.zeros_like(x), x, t, y)
    # gradient (1 + 2, -5 + 2), t / (1 - t) = 1, scale 3, minus
    assert torch.allclose(v, torch.tensor([[-9.0, 9.0]]).expand(3, 2))
    v = guide(reward, [1.0, 0.0, 0.0], eps=0.5)(torch.zeros_like(x), x, t, y)
    assert torch.allclose(v[:, 0], torch.full((3,), -0.5))  # .5 / (1 - .5 + .5)


def test_nothing_is_guided_with_zeros_or_outside_the_interval():
    k = torch.tensor([2.0])
    x1 = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(5, 1, dtype=torch.int64)
    plain = sample(velocity, x1, y, steps=7)
    for guidance in (
        guide(value_of(k), [0.0, 0.0, 0.0]),
        guide(value_of(k), [1.0], scale=0.0),
        guide(value_of(k), [1.0], interval=(0.2, 0.1)),
    ):
        assert torch.equal(sample(velocity, x1, y, steps=7, guidance=guidance), plain)
    late = guide(value_of(k), [1.0], interval=(0.0, 0.5))
    v, x = torch.zeros(2, 1), torch.ones(2, 1)
    out = late(v, x, torch.tensor([0.6, 0.4]), y)
    assert out[0] == 0 and out[1] != 0


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_no_step_count_makes_a_nan(eps):
    k = torch.tensor([1.0, -3.0])
    x1 = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4, 1, dtype=torch.int64)
    for steps in range(1, 101):
        assert sample(velocity, x1, y, steps=steps, guidance=guide(value_of(k), [1.0], eps=eps)).isfinite().all()


def test_the_gradient_reaches_the_clip_alone():
    layer = torch.nn.Linear(2, 3)
    x = torch.randn(4, 2, requires_grad=True)
    with torch.no_grad():
        v = guide(lambda x_t, t, y: layer(x_t), [1.0, 1.0, 1.0])(torch.zeros(4, 2), x, torch.full((4,), 0.3), None)
    assert not v.requires_grad and layer.weight.grad is None and x.grad is None
    with pytest.raises(ValueError, match="eps"):
        guide(layer, [1.0], eps=-1.0)


def test_the_unified_view_knows_its_truth(monkeypatch):
    # p* by brute force on a fine grid: p_ref exp(x / beta), normalised
    x = torch.linspace(-6, 8, 140_001, dtype=torch.float64)
    log_p = torch.logsumexp(-0.5 * ((x[:, None] - evaluate_unified.MEANS.double()) / evaluate_unified.STD) ** 2, 1)
    p = torch.softmax(log_p + x / evaluate_unified.BETA, 0)
    share, mean = evaluate_unified.truth()
    assert mean == pytest.approx((p * x).sum().item(), abs=1e-4)
    edges = evaluate_unified.EDGES
    inside = p[(x >= edges[40].item()) & (x < edges[41].item())].sum().item()
    assert share[40].item() == pytest.approx(inside, abs=1e-4)
    monkeypatch.setattr(evaluate_unified, "SAMPLES", 4000)
    reference, exact = (evaluate_unified.judged(name, 0)[0] for name in ("reference", "nrg-exact"))
    assert reference["mean"] == pytest.approx(0.0, abs=0.08) and exact["mean"] == pytest.approx(mean, abs=0.05)
    # the mean moves by .92, all of it mass moved to the right: so far is p_ref from p*
    assert reference["distance"] == pytest.approx(mean, abs=0.08) and exact["distance"] < 0.05

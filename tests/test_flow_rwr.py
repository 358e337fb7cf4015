"""Flow-RWR and SFT: weights by hand, and the optimum they lead to."""

import math

import pytest
import torch

from flow_rwr import effective_samples, flow_rwr_step, rwr_weights


def test_weights_by_hand():
    # exp(0), exp(ln 3) = 1, 3: mean 2; at temperature 2: 1, sqrt 3
    reward, root = torch.tensor([0.0, math.log(3.0)]), 3**0.5
    assert rwr_weights(reward).tolist() == pytest.approx([0.5, 1.5])
    expected = [2 / (1 + root), 2 * root / (1 + root)]
    assert rwr_weights(reward, 2.0).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="above 0"):
        rwr_weights(reward, 0.0)


@pytest.mark.parametrize("reward", [[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [3e38, 3e38, -3e38]])
def test_weights_are_finite_with_mean_one_for_any_finite_reward(reward):
    weight = rwr_weights(torch.tensor(reward))
    assert weight.isfinite().all() and (weight >= 0).all()
    assert weight.mean().item() == pytest.approx(1)


def test_effective_samples_by_hand():
    assert effective_samples(torch.ones(7)) == pytest.approx(1)
    assert effective_samples(torch.tensor([4.0, 0.0, 0.0, 0.0])) == pytest.approx(1 / 4)


def test_each_clip_counts_by_its_own_weight():
    # v = 0, x1 = 0: a clip's error is the mean square of x0, 1 and 4
    x0 = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1, 1).expand(2, 3, 2, 4, 4)
    weight, t = torch.tensor([1.5, 0.5]), torch.tensor([0.2, 0.9])

    def still(x, t, y):
        return torch.zeros_like(x)

    loss, logs = flow_rwr_step(still, x0, None, weight, t, torch.zeros_like(x0))
    assert loss.item() == pytest.approx(1.75)  # (1.5 * 1 + .5 * 4) / 2
    assert logs["error"] == pytest.approx(2.5)
    assert logs["effective_samples"] == pytest.approx(2**2 / (2 * 2.5))

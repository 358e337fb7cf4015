"""DiffusionNFT: what its formulas give by hand, and what no gradient may reach."""

import math

import pytest
import torch

from online.flow_nft import flow_nft_loss, flow_nft_step, move_old, nft_error, optimality


def test_optimality_by_hand():
    # differences from the prompts' means: -1, 1 and 0, 0; their root mean square is sqrt(1/2)
    reward = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    assert optimality(reward).tolist() == [[0.0, 1.0], [0.5, 0.5]]  # sqrt 2 of them, cut at 1
    third = 1 / (3 * math.sqrt(0.5)) / 2
    assert torch.allclose(
        optimality(reward, spread=3.0), torch.tensor([[0.5 - third, 0.5 + third], [0.5, 0.5]])
    )
    assert torch.equal(optimality(torch.full((3, 4), 7.0)), torch.full((3, 4), 0.5))
    rounding = torch.tensor([[0.0, 1e-6], [0.3, 0.3]])  # Z is then .01: r moves by 5e-7 / .01 / 2
    assert (optimality(rounding) - 0.5).abs().max().item() == pytest.approx(2.5e-5, rel=0.05)
    assert torch.allclose(
        optimality(reward + torch.tensor([[10.0], [-3.0]])), optimality(reward)
    )  # within a prompt


def test_error_is_of_x0_over_its_own_size_which_has_no_gradient():
    # x0 = 0, x1 = (1, 3), t = 1/2: x_t = (1/2, 3/2); v = (3, 1) gives x0_hat = (-1, 1)
    x0, x_t, t = torch.zeros(1, 2), torch.tensor([[0.5, 1.5]]), torch.tensor([0.5])
    v = torch.tensor([[3.0, 1.0]], requires_grad=True)
    error = nft_error(v, x_t, x0, t)
    assert error.item() == 1.0  # mean square 1 over mean size 1
    error.sum().backward()
    # d/dv of the mean of (x_t - t v)^2, the size held: -2 t x0_hat / 2
    assert torch.allclose(v.grad, torch.tensor([[0.5, -0.5]]))
    assert nft_error(v, x_t, torch.tensor([[-1.0, -1.0]]), t).item() == pytest.approx(
        2.0
    )  # 0, 2: 2 over 1


def test_loss_by_hand():
    positive, negative, drift = (
        torch.tensor([1.0, 2.0]),
        torch.tensor([4.0, 8.0]),
        torch.tensor([0.5, 1.5]),
    )
    loss, logs = flow_nft_loss(positive, negative, torch.tensor([1.0, 0.25]), drift, kl=2.0)
    assert loss.item() == pytest.approx((1 + (0.5 + 6)) / 2 + 2 * 1.0)
    assert logs == pytest.approx({"loss": 5.75, "positive": 1.5, "negative": 6.0, "drift": 1.0})


class Constant(torch.nn.Module):
    """v is one number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x_t, t, y):
        return self.value.expand_as(x_t)


def gradient(r, policy, old=0.0, beta=1.0, kl=0.0, reference=0.0, noise=None):
    """Of the policy's number, on clips of zeros with noise of ones, so v* = 1, at t = 1/2; the others'; logs."""
    models = [Constant(value) for value in (policy, old, reference)]
    x0, t = torch.zeros(4, 3, 1, 2, 2), torch.full((4,), 0.5)
    x1 = torch.ones_like(x0) if noise is None else noise
    loss, logs = flow_nft_step(*models, x0, None, torch.full((4,), r), t, x1, beta, kl)
    loss.backward()
    return models[0].value.grad.item(), [model.value.grad for model in models[1:]], logs


def test_a_good_clip_draws_the_policy_and_a_bad_one_drives_it_away():
    # at v = v_old = 0: x0_hat(v+-) - x0 = 1/2 -+ beta v / 2, so that d/dv of its square over its size 1/2 is -+ beta
    assert gradient(1.0, 0.0)[0] == pytest.approx(-1.0)  # a step against it goes to v* = 1
    assert gradient(0.0, 0.0)[0] == pytest.approx(1.0)
    assert gradient(0.75, 0.0)[0] == pytest.approx(-0.5)
    assert gradient(1.0, 0.0, beta=0.5)[0] == pytest.approx(-0.5)


def test_with_one_half_everywhere_the_old_model_is_kept():
    """Both implicit policies then learn the same clips: from v_old no way leads anywhere, and any other policy is drawn
    back, as |a + b| + |a - b| has its least at b = 0."""
    noise = torch.randn(4, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert gradient(0.5, 0.0, noise=noise)[0] == pytest.approx(0.0, abs=1e-6)
    assert gradient(0.5, 0.2, noise=noise)[0] > 0.01 and gradient(0.5, -0.2, noise=noise)[0] < -0.01
    assert (
        gradient(0.5, 0.5, old=0.3, noise=noise)[0] > 0.01
        and gradient(0.5, 0.1, old=0.3, noise=noise)[0] < -0.01
    )


def test_beta_is_the_distance_of_the_implicit_policies():
    # v = 1 = v*: with beta 1 v+ is right and v- is 1 off, so x0_hat is 1 off: 1 over 1
    _, _, logs = gradient(0.5, 1.0)
    assert logs["positive"] == 0 and logs["negative"] == pytest.approx(1.0)
    # beta 1/2: v+ = 1/2, v- = -1/2, x0_hat off by 1/4 and 3/4, which are square over size
    _, _, logs = gradient(0.5, 1.0, beta=0.5)
    assert logs["positive"] == pytest.approx(0.25) and logs["negative"] == pytest.approx(0.75)


def test_drift_is_from_the_reference_and_pulls_back_with_its_weight():
    _, _, logs = gradient(0.5, 0.5, old=0.5, reference=0.1)
    assert logs["drift"] == pytest.approx(0.16)
    free, held = (gradient(0.5, 0.5, old=0.5, reference=0.1, kl=kl)[0] for kl in (0.0, 3.0))
    assert held - free == pytest.approx(3 * 2 * 0.4)


def test_old_and_reference_get_no_gradient():
    _, others, _ = gradient(1.0, 0.3, kl=1.0)
    assert others == [None, None]


def test_the_old_model_moves_by_its_decay():
    old, policy = Constant(1.0), Constant(5.0)
    move_old(old, policy, 0.75)
    assert old.value.item() == 2.0 and policy.value.item() == 5.0
    move_old(old, policy, 0.0)
    assert old.value.item() == 5.0
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
            move_old(old, policy, decay)

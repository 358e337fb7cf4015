"""DiffusionNFT: what its formulas give by hand, and what no gradient may reach."""

import math

import pytest
import torch

from online.flow_nft import flow_nft_step, move_old, nft_error, optimality


def test_optimality_by_hand():
    # differences from the prompts' means: -1, 1 and 0, 0; their root mean square is sqrt(1/2)
    reward = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    assert optimality(reward).tolist() == [[0.0, 1.0], [0.5, 0.5]]  # sqrt 2 of them, cut at 1
    third = 1 / (3 * math.sqrt(0.5)) / 2
    r = optimality(reward, spread=3.0)
    assert torch.allclose(r, torch.tensor([[0.5 - third, 0.5 + third], [0.5, 0.5]]))
    assert torch.equal(optimality(torch.full((3, 4), 7.0)), torch.full((3, 4), 0.5))
    rounding = torch.tensor([[0.0, 1e-6], [0.3, 0.3]])  # Z is then .01: r moves by 5e-7 / .01 / 2
    assert (optimality(rounding) - 0.5).abs().max().item() == pytest.approx(2.5e-5, rel=0.05)


def test_error_is_of_x0_over_its_own_size_which_has_no_gradient():
    # x0 = 0, x1 = (1, 3), t = 1/2: x_t = (1/2, 3/2); v = (3, 1) gives x0_hat = (-1, 1)
    x0, x_t, t = torch.zeros(1, 2), torch.tensor([[0.5, 1.5]]), torch.tensor([0.5])
    v = torch.tensor([[3.0, 1.0]], requires_grad=True)
    error = nft_error(v, x_t, x0, t)
    assert error.item() == 1.0  # mean square 1 over mean size 1
    error.sum().backward()
    # d/dv of the mean of (x_t - t v)^2, the size constant: -2 t x0_hat / 2
    assert torch.allclose(v.grad, torch.tensor([[0.5, -0.5]]))
    assert nft_error(v, x_t, torch.full((1, 2), -1.0), t).item() == pytest.approx(2.0)  # 2 over 1


class Constant(torch.nn.Module):
    """v is one number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(float(value)))

    def forward(self, x_t, t, y):
        return self.value.expand_as(x_t)


def step(r, policy, old=0.0, beta=1.0, kl=0.0, reference=0.0):
    """d loss / d policy on clips of zeros with noise of ones, so v* = 1, at t = 1/2; the logs."""
    policy, *others = (Constant(value) for value in (policy, old, reference))
    x0, t = torch.zeros(4, 3, 1, 2, 2), torch.full((4,), 0.5)
    r, x1 = torch.full((4,), r), torch.ones_like(x0)
    loss, logs = flow_nft_step(policy, *others, x0, None, r, t, x1, beta, kl)
    loss.backward()
    assert all(model.value.grad is None for model in others)
    assert logs["loss"] == loss.item()
    return policy.value.grad.item(), logs


def test_a_good_clip_attracts_the_policy_and_a_bad_one_repels_it():
    # at v = v_old = 0: x0_hat(v+-) = 1/2 -+ beta v / 2, whose square over size has slope -+ beta
    for r, beta, slope in ((1, 1, -1), (0, 1, 1), (0.75, 1, -0.5), (1, 0.5, -0.5)):
        assert step(r, 0.0, beta=beta)[0] == pytest.approx(slope)


def test_loss_by_hand():
    # v = 1 = v*. With v_old = 0 and beta 1, v+ = 1 and v- = -1, so x0_hat is 0 and 1 off. With beta
    # 1/2, v+ = 1/2 and v- = -1/2: 1/4 and 3/4 off. With v_old = 1/2, v+ = 3/4 and v- = 1/4: 1/8 and
    # 3/8. Errors are square over size. The drift is (1 - .6)^2 = .16
    cases = (1.0, 0.0, 0.0, 1.0), (0.5, 0.0, 0.25, 0.75), (0.5, 0.5, 0.125, 0.375)
    for beta, old, positive, negative in cases:
        logs = step(0.25, 1.0, old, beta=beta, kl=2.0, reference=0.6)[1]
        loss = 0.25 * positive + 0.75 * negative + 2 * 0.16
        expected = {"loss": loss, "positive": positive, "negative": negative, "drift": 0.16}
        assert logs == pytest.approx(expected, abs=1e-6)
    free, pulled = (step(0.5, 0.5, 0.5, reference=0.1, kl=kl)[0] for kl in (0.0, 3.0))
    assert pulled - free == pytest.approx(3 * 2 * 0.4)


def test_the_old_model_moves_by_its_decay():
    old, policy = Constant(1.0), Constant(5.0)
    move_old(old, policy, 0.75)
    assert old.value.item() == 2.0 and policy.value.item() == 5.0

"""qk-norm and rotary positions."""

import pytest
import torch

from model import apply_rope, identity_rope, rms_norm, rope


def norm_and_turn(x, weight, table):
    """What Attention does to its queries and keys."""
    return apply_rope(rms_norm(x, weight), table).to(x.dtype)


def plainly(x, weight, cos, sin):
    """The same by complex numbers: channel i + i channel i + D / 2, times e^(i angle), in float64."""
    x, weight = x.double(), weight.double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def test_a_norm_by_hand():
    # rms of (3, 4) is sqrt(12.5)
    out = norm_and_turn(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([1.0, 2.0]), identity_rope(1, 2))
    assert out.flatten().tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5], rel=1e-5)


def test_a_turn_by_hand():
    # of 16 channels 8 pairs: 2 turn with the frame, 3 each with row and column; the first of each by 1 radian a token.
    # Pair 0 is channels 0 and 8; (1, 0) turned by 1 radian is (cos 1, sin 1). A head of one 4 has rms 1.
    x = torch.zeros(1, 2, 1, 16)
    x[..., 0] = 4.0
    out = norm_and_turn(x, torch.ones(16), rope((2, 1, 1), 16))[0, :, 0]
    assert torch.allclose(out[0], x[0, 0, 0], atol=1e-5)
    assert out[1, [0, 8]].tolist() == pytest.approx([4 * 0.540302, 4 * 0.841471], rel=1e-5)
    assert out[1].norm().item() == pytest.approx(4.0, rel=1e-5)


def test_turns_keep_lengths_and_make_products_relative():
    table = rope((3, 4, 5), 16)
    assert table.shape == (2, 60, 16)
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)
    turned = [norm_and_turn(x.expand(1, 60, 1, 16), torch.ones(16), table)[0, :, 0] for x in (q, k)]
    assert torch.allclose(turned[0].norm(dim=-1), torch.tensor(4.0).expand(60), atol=1e-5)
    products = (turned[0] @ turned[1].T).reshape(3, 4, 5, 3, 4, 5)
    # one step in t, h or w is the same step anywhere
    assert torch.allclose(products[0, 1, 2, 1, 3, 3], products[1, 0, 1, 2, 2, 2], atol=1e-4)
    assert not torch.allclose(products[0, 1, 2, 1, 3, 3], products[0, 1, 2, 1, 3, 2], atol=1e-2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_output_and_gradients_are_those_of_the_plain_formula(dtype, tolerance):
    torch.manual_seed(0)
    # a slice of a larger tensor, as in the model
    whole = torch.randn(2, 12, 3, 2, 8, dtype=dtype, requires_grad=True)
    weight = (torch.rand(8, dtype=dtype) + 0.5).requires_grad_(True)
    table = torch.cat((identity_rope(4, 8), rope((2, 2, 2), 8)), 1)
    out = norm_and_turn(whole[:, :, 1], weight, table)
    expected = plainly(whole[:, :, 1], weight, table[0, :, :4], table[1, :, 4:])
    assert out.dtype == dtype and torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (whole, weight), grad)
    for here, there in zip(found, torch.autograd.grad(expected, (whole, weight), grad.double())):
        assert here.dtype == dtype and (here - there).abs().max() <= tolerance * (1 + there.abs().max())
    assert not found[0][:, :, [0, 2]].any()


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 2, 6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    table = rope((1, 2, 2), 6).double()
    torch.autograd.gradcheck(
        lambda x, weight: norm_and_turn(x, weight, table), [x.requires_grad_(), weight.requires_grad_()]
    )
    frozen = weight.detach()
    torch.autograd.gradcheck(lambda x: norm_and_turn(x, frozen, table), [x])


def test_a_second_backward_is_exact_and_compiling_gives_one_graph():
    torch.manual_seed(0)
    x, table = torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True), rope((1, 2, 2), 8).double()
    weight = (torch.rand(8, dtype=torch.float64) + 0.5).requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda x, weight: norm_and_turn(x, weight, table), [x, weight])
    compiled = torch.compile(norm_and_turn, backend="aot_eager", fullgraph=True)
    pairs = [torch.autograd.grad(f(x, weight, table).exp().sum(), (x, weight)) for f in (compiled, norm_and_turn)]
    assert all(torch.allclose(here, there, atol=1e-9) for here, there in zip(*pairs))

"""qk-norm, and rotary positions (RoPE) along the time, the height and the width of a video: one function, as both are
many small passes over the same queries and keys."""

import torch
from torch.autograd.function import once_differentiable

from attention import precise


def rope_table(grid, head_dim, theta=100.0):
    """Cosines and signed sines (2, T*H*W, head_dim) for tokens in (t, h, w) order on `grid` = (T, H, W).

    Channel i pairs with i + head_dim / 2; turned, a head's channels x are x cos + roll(x, head_dim / 2) sin. A pair
    turns by an angle proportional to the token's frame, row or column, so that a logit depends on how far apart two
    tokens are. Of a head's pairs a quarter turns with the frame and three eighths each with row and column. No
    wavelength is longer than 2 pi theta tokens: theta is 100, not the 10,000 of text, as a clip has a few dozen tokens
    a side."""
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8)
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = []
    for count, position in zip(split, positions):
        frequency = theta ** -(torch.arange(count, dtype=torch.float32) / max(count, 1))
        angles.append(position.flatten()[:, None] * frequency)
    angles = torch.cat(angles, 1)  # (N, pairs)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def still_table(count, head_dim):
    """The table (2, count, head_dim) of tokens without a place: they are not turned."""
    return torch.stack((torch.ones(count, head_dim), torch.zeros(count, head_dim)))


class NormAndTurn(torch.autograd.Function):
    """`norm_and_turn` with a backward of its own: it keeps x alone and on a CPU takes two thirds of autograd's time. It
    can not be differentiated again and says so. With n = x / rms, and R the rotation, whose transpose turns back:
    y = R (n w), so

        u = R^T dy        dw = sum of u n over tokens and heads        dx = (u w - n mean(u w n)) / rms"""

    @staticmethod
    def forward(ctx, x, weight, table, eps):
        wide = x.to(precise(x))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # 1 / rms (B, N, heads, 1)
        ctx.save_for_backward(x, weight, table, inverse)
        cos, sin = table[:, :, None]  # (N, 1, head_dim) each
        scaled = (wide * inverse).mul_(weight)
        return (scaled * cos).addcmul_(scaled.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, table, inverse = ctx.saved_tensors
        cos, sin = table[:, :, None]
        grad, normed = grad.to(inverse.dtype), x * inverse
        turned = (grad * sin).roll(x.shape[-1] // 2, -1).addcmul_(grad, cos)  # u
        product = turned * normed
        d_weight = product.sum((0, 1, 2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = product.mul_(weight).mean(-1, keepdim=True)
        return turned.mul_(weight).addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), d_weight, None, None


def norm_and_turn(x, weight, table, eps=1e-6):
    """qk-norm and rotary positions: x (B, N, heads, head_dim) / rms(x) * weight (head_dim,), which bounds the logits,
    then each token turned by its row of `table` (2, N, head_dim). In float32 or x's own dtype where that holds more."""
    return NormAndTurn.apply(x, weight, table, eps)

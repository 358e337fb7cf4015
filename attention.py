"""Attention: one function, a few backends, and the rotary positions of a video.

    reference   softmax(q k^T / sqrt(d)) v in float64: what every other backend is tested against
    naive       the same in the input's dtype: three plain operations; differentiable twice
    sdpa        torch's fused kernel: no N x N matrix is kept
    auto        the fastest of these for the device, dtype and length

Also here: per-head RMS normalisation of q and k, which bounds the logits, and 3D rotary embeddings (RoPE), which turn
each pair of channels of q and k by an angle proportional to the token's frame, row or column, so that a logit depends
on how far apart two tokens are in time and space.
"""

import torch
import torch.nn.functional as F

BACKENDS = ("auto", "reference", "naive", "sdpa")


def attention(q, k, v, backend="auto"):
    """Softmax attention: q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) -> (B, heads, N, head_dim).

    ValueError for an unknown backend."""
    if backend == "auto":
        backend = _choose(q, k)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    if backend == "naive":
        return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
    if backend == "reference":
        return attention(q.double(), k.double(), v.double(), "naive").to(v.dtype)
    raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")


def _choose(q, k):
    """On a CPU the fused kernel is slow in bfloat16 up to about 1,000 tokens (1.4 to 3.7 times naive's time on a CPU
    with bf16 instructions); everywhere else it wins."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 1024
    return "naive" if slow else "sdpa"


def rms_norm(x, weight, eps=1e-6):
    """x / rms(x) * weight over the last dimension, in float32: qk-norm, with one weight for each channel of a head."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def rope_table(grid, head_dim, theta=100.0):
    """Cosines and sines (2, T*H*W, head_dim // 2) for tokens in (t, h, w) order on `grid` = (T, H, W).

    Of the head's channel pairs a quarter turns with the frame and three eighths each with row and column. theta is the
    longest wavelength over 2 pi, in tokens: 100, not the 10,000 of text, as a clip has a few dozen tokens a side."""
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8)
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = []
    for count, position in zip(split, positions):
        frequency = theta ** -(torch.arange(count, dtype=torch.float32) / max(count, 1))
        angles.append(position.flatten()[:, None] * frequency)
    angles = torch.cat(angles, 1)  # (N, pairs)
    return torch.stack((angles.cos(), angles.sin()))


def still_table(count, head_dim):
    """The table (2, count, head_dim // 2) of tokens without a place: they are not turned."""
    return torch.stack((torch.ones(count, head_dim // 2), torch.zeros(count, head_dim // 2)))


def rotate(x, table):
    """Turns x (B, heads, N, head_dim) by `table` (2, N, head_dim // 2); channel i pairs with i + head_dim / 2."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

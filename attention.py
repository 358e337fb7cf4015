"""Attention behind one function: attention(q, k, v, tiles=None, backend="auto").

    naive    softmax(q k^T / sqrt(d)) v in three plain operations; can be differentiated twice
    sdpa     torch's fused kernel: the fastest dense one
    sdpa32   the same in float32, for bfloat16 on a CPU that has no instructions for it
    tiled, gather, triton      over tiles: kernels/tiles.py
    auto     the fastest of these for the device, dtype and tiles, by `evaluate.py bench`

The backward of sdpa, tiled and triton cannot be differentiated again and says so; a gradient
penalty needs `naive`. The paper's attention is spatial, then 3D (appendix D); ours is 3D alone.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F

from kernels.tiles import boolean_mask, gather, tile_attention
from runtime.device import has_bf16

HAS_TRITON = importlib.util.find_spec("triton") is not None


def attention(q, k, v, tiles=None, backend="auto"):
    """Softmax attention: q (B, heads, N, head_dim), k, v (B, heads, M, head_dim) -> q's shape.

    tiles: a SlidingTiles, with N = M tokens in its order, or None for dense attention. ValueError
    for an unknown backend, and for tiled, gather or triton without tiles."""
    if tiles is not None and tiles.full:
        tiles = None
    if backend == "auto":
        backend = choose(q, tiles)
    if backend == "gather" and tiles is not None:
        return gather(q, k, v, tiles)
    if backend in ("tiled", "triton") and tiles is not None:
        return tile_attention(q, k, v, tiles.lists(), tiles.words, tiles.tile, backend)[0]

    mask = None if tiles is None else boolean_mask(tiles, q.shape[-2])
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, mask)
    if backend == "sdpa32":
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(v.dtype)
    if backend == "naive":
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, N, M)
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        return torch.softmax(logits, -1) @ v
    raise ValueError(f"attention backend {backend!r} is unknown or needs tiles")


def choose(q, tiles=None):
    """The fastest backend for the device, dtype, length and tiles."""
    if tiles is not None:
        fits = tiles.tile in (16, 32, 64, 128) and q.shape[-1] in (16, 32, 64, 128)
        fits &= tiles.tile * q.shape[-1] * q.element_size() <= 2**15  # of 227 KiB shared memory
        return "triton" if q.is_cuda and fits and HAS_TRITON else "gather"
    if q.device.type == "cpu":
        is_bf16 = q.dtype == torch.bfloat16
        if is_bf16 and not has_bf16(q.device):
            return "sdpa32"  # the fused backward takes 3 to 6 times as long in bfloat16
        short = 4096 if is_bf16 else 80  # where sdpa is slower than three plain operations
        return "naive" if q.shape[-2] <= short else "sdpa"
    return "sdpa"

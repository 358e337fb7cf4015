"""Attention behind one function: attention(q, k, v, plan=None, backend="auto").

    naive    softmax(q k^T / sqrt(d)) v in three plain operations; keeps N x N numbers; can be differentiated twice
    sdpa     torch's fused kernel: the fastest dense one
    sdpa32   the same in float32, for bfloat16 on a CPU that has no instructions for it
    tiled, gather, triton      over tiles: kernels/tiles.py
    auto     the fastest of these for the device, dtype and plan, by `evaluate.py bench`

The backward of sdpa, tiled and triton can not be differentiated again and says so; a gradient penalty needs `naive`.
Of its generator's attention the paper says that it is spatial, then 3D (appendix D); here it is 3D alone.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F

from kernels.tiles import KERNELS, boolean_mask, dense_mask, gather, tile_attention
from runtime.cli import has_bf16

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "naive", "sdpa", "sdpa32", "tiled", "gather", "triton")


# ---------------------------------------------------------------------------------------------
# The function


def attention(q, k, v, plan=None, backend="auto"):
    """Softmax attention: q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) -> (B, heads, N, head_dim).

    plan: a TileMask (kernels/tiles.py), with N = M tokens in its order, or None for dense. ValueError for an unknown
    backend, for `gather` without a plan, and for `triton` where it can not run."""
    if backend == "auto":
        backend = choose(q, plan)
    if backend == "gather" and plan is not None:
        return gather(q, k, v, plan)
    if backend == "triton":
        load_triton()
    if backend in ("tiled", "triton"):
        plan = plan or dense_mask(q.shape[-2], k.shape[-2], q.device)
        return tile_attention(q, k, v, *plan[4:], plan.words, plan.tile, backend)[0]
    mask = None if plan is None else boolean_mask(plan, q.shape[-2])
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, mask)
    if backend == "sdpa32":
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(v.dtype)
    if backend == "naive":
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return (
            torch.softmax(logits if mask is None else logits.masked_fill(~mask, -math.inf), -1) @ v
        )
    raise ValueError(
        f"attention backend {backend!r} is unknown or needs a plan; known: {', '.join(BACKENDS)}"
    )


def choose(q, plan=None):
    """The fastest backend for the device, dtype, length and plan."""
    if plan is not None:
        fits = plan.tile in (16, 32, 64, 128) and q.shape[-1] in (16, 32, 64, 128)
        fits &= (
            plan.tile * q.shape[-1] * q.element_size() <= 2**15
        )  # or shared memory, of 227 KiB, is too small
        return "triton" if q.is_cuda and fits and HAS_TRITON else "gather"
    if q.device.type == "cpu":
        if q.dtype == torch.bfloat16 and not has_bf16(q.device):
            return "sdpa32"  # the fused kernel's backward takes 3 to 6 times as long in bfloat16
        short = (
            4096 if q.dtype == torch.bfloat16 else 80
        )  # in bfloat16 sdpa takes 1.4 to 3.7 times as long
        return "naive" if q.shape[-2] <= short else "sdpa"
    return "sdpa"


def load_triton():
    """Imports the kernels where they are first asked for. ValueError without Triton."""
    if not HAS_TRITON:
        raise ValueError(
            "attention backend 'triton' needs the package triton, which comes with CUDA builds of torch"
        )
    from kernels import tiles_triton

    KERNELS["triton"] = tiles_triton

"""Attention: one function over a plan (dense, or sliding tiles), and a few backends.

    naive    softmax(q k^T / sqrt(d)) v in three plain operations; keeps N x N numbers; can be differentiated twice
    sdpa     torch's fused kernel: the fastest dense one
    sdpa32   the same in float32, for bfloat16 on a CPU that has no instructions for it
    tiled    the algorithm of flash attention in readable PyTorch: online softmax over tiles, own backward
    gather   sliding tiles on any device: the keys that a tile of queries sees are copied together, then one sdpa call
    triton   `tiled` as GPU kernels (attention_triton.py): only the tiles in the plan are read, nothing is copied
    auto     the fastest of these for the device, dtype and plan, by `bench.py`

Sliding tile attention (arXiv 2502.04507) cuts the video into boxes of T x H x W tokens; all queries of a box see the
same boxes of keys, those around it. The window stops at the border instead of leaving it, so every box sees equally
many. Tokens must lie in the plan's order, box after box, the words of the prompt before them: words see everything and
everything sees them.

`tiled` and `triton` are one custom op, which torch.compile traces. Their backward, like sdpa's, can not be
differentiated again and says so; a gradient penalty needs `naive`.

Of its generator's attention the paper says that it is spatial, then 3D (appendix D); here it is 3D alone.
"""

import importlib.util
import itertools
import math
import re
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import BadInput, has_bf16

BACKENDS = ("auto", "naive", "sdpa", "sdpa32", "tiled", "gather", "triton")
TILE = 64  # tokens of a block where there is no plan
HAS_TRITON = importlib.util.find_spec("triton") is not None

# ---------------------------------------------------------------------------------------------------------------------
# Plans: who sees whom


class TilePlan(NamedTuple):
    """Blocks of at most `tile` tokens: first the words, cut as they come, then the boxes of the video."""

    words: int  # tokens before the video's
    tile: int  # tokens of a box
    order: torch.Tensor  # (video tokens,): the token, counted in (t, h, w) order, at each place of the plan's order
    inverse: torch.Tensor  # (video tokens,): x[:, order][:, inverse] is x
    keys: torch.Tensor  # (blocks, most) int32: the key blocks that each query block sees, then zeros
    counts: torch.Tensor  # (blocks,) int32: how many these are
    queries: torch.Tensor  # (blocks, most') int32: the same seen from the keys, for their gradients
    query_counts: torch.Tensor  # (blocks,) int32


def parse_attention(text):
    """ "full" -> None; "tile:T,H,W" or "tile:T,H,W/t,h,w" -> (tokens of a box, window in boxes; 3,3,3 if not given).
    BadInput for any other text."""
    if text == "full":
        return None
    three = r"(\d+),(\d+),(\d+)"
    found = re.fullmatch(f"tile:{three}(?:/{three})?", text)
    sides = [int(side or 3) for side in found.groups()] if found else [0]
    if min(sides) < 1:
        raise BadInput(
            f"--attention {text}: must be full, tile:T,H,W or tile:T,H,W/t,h,w, for example tile:2,4,4/1,3,3"
        )
    return tuple(sides[:3]), tuple(sides[3:])


@lru_cache
@torch.inference_mode(False)  # a plan made while sampling serves the next training, too
def tile_plan(text, grid, words, device):
    """The TilePlan of `text` for video tokens on `grid` = (T, H, W) after `words` words; None for "full".

    BadInput if the grid is not a whole number of boxes. A window wider than the grid is cut to it."""
    if (parsed := parse_attention(text)) is None:
        return None
    box, window = parsed
    if any(n % side for n, side in zip(grid, box)):
        raise BadInput(f"--attention {text}: {box} does not divide the grid of {grid} tokens (t, h, w)")
    boxes = [n // side for n, side in zip(grid, box)]
    window = [min(w, n) for w, n in zip(window, boxes)]
    t, h, w = box
    place = torch.arange(math.prod(grid)).reshape(boxes[0], t, boxes[1], h, boxes[2], w)
    order = place.permute(0, 2, 4, 1, 3, 5).flatten()

    first = -(-words // (t * h * w))  # blocks of words
    count = first + math.prod(boxes)
    sees = torch.zeros(count, count, dtype=torch.bool)
    sees[:first] = sees[:, :first] = True
    for i, at in enumerate(itertools.product(*map(range, boxes))):
        starts = [min(max(x - w // 2, 0), n - w) for x, w, n in zip(at, window, boxes)]  # stops at the border
        near = torch.zeros(boxes, dtype=torch.bool)
        near[tuple(slice(start, start + w) for start, w in zip(starts, window))] = True
        sees[first + i, first:] = near.flatten()
    tensors = order, order.argsort(), *_lists(sees), *_lists(sees.T)
    return TilePlan(words, t * h * w, *(tensor.to(device) for tensor in tensors))


def _lists(sees):
    """Boolean (blocks, blocks) -> the columns of each row's true entries (blocks, most), how many (blocks,)."""
    counts = sees.sum(1)
    columns = sees.int().argsort(dim=1, descending=True, stable=True)[:, : counts.max()]
    return torch.where(torch.arange(columns.shape[1]) < counts[:, None], columns, 0).int(), counts.int()


@lru_cache
@torch.inference_mode(False)
def dense_plan(queries, keys, device):
    """The plan of "full" for so many tokens: blocks of TILE, each of which sees all."""
    sees = torch.ones(-(-queries // TILE), -(-keys // TILE), dtype=torch.bool)
    none = torch.empty(0, dtype=torch.int64)
    return TilePlan(-1, TILE, none, none, *(x.to(device) for x in (*_lists(sees), *_lists(sees.T))))


def blocks(count, words, tile):
    """Slices of `count` tokens: blocks of words, then boxes; `words` -1 for words alone."""
    words = count if words < 0 else words
    ends = (
        [*range(0, words, tile), *range(words, count + 1, tile)] if words < count else [*range(0, count, tile), count]
    )
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def plan_mask(plan, count):
    """Boolean (count, count): which keys each query sees. What the backends are tested against."""
    parts = blocks(count, plan.words, plan.tile)
    mask = torch.zeros(count, count, dtype=torch.bool, device=plan.keys.device)
    for i, rows in enumerate(parts):
        for j in plan.keys[i, : plan.counts[i]].tolist():
            mask[rows, parts[j]] = True
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# The function


def attention(q, k, v, plan=None, backend="auto"):
    """Softmax attention: q (B, heads, N, head_dim), k and v (B, heads, M, head_dim) -> (B, heads, N, head_dim).

    plan: a TilePlan, with N = M tokens in its order, or None for dense. ValueError for an unknown backend, for
    `gather` without a plan, and for `triton` where it can not run."""
    if backend == "auto":
        backend = choose(q, plan)
    if backend == "gather" and plan is not None:
        return gather(q, k, v, plan)
    if backend in ("tiled", "triton"):
        plan = plan or dense_plan(q.shape[-2], k.shape[-2], q.device)
        return tile_attention(q, k, v, *plan[4:], plan.words, plan.tile, backend)[0]
    mask = None if plan is None else plan_mask(plan, q.shape[-2])
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, mask)
    if backend == "sdpa32":
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(v.dtype)
    if backend == "naive":
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        return torch.softmax(logits if mask is None else logits.masked_fill(~mask, -math.inf), -1) @ v
    raise ValueError(f"attention backend {backend!r} is unknown or needs a plan; known: {', '.join(BACKENDS)}")


def choose(q, plan=None):
    """The fastest backend for the device, dtype, length and plan."""
    if plan is not None:
        fits = plan.tile in (16, 32, 64, 128) and q.shape[-1] in (16, 32, 64, 128)
        return "triton" if q.is_cuda and fits and HAS_TRITON else "gather"
    if q.device.type == "cpu":
        if q.dtype == torch.bfloat16 and not has_bf16(q.device):
            return "sdpa32"  # the fused kernel's backward takes 3 to 6 times as long in bfloat16
        short = 1024 if q.dtype == torch.bfloat16 else 80  # bfloat16 on a Zen 4: sdpa takes 1.4 to 3.7 times as long
        return "naive" if q.shape[-2] <= short else "sdpa"
    return "sdpa"


def gather(q, k, v, plan):
    """Sliding tiles by copying: each box of queries gets the words and the boxes of keys it sees, side by side.

    All boxes see equally many, so that one dense call of B * heads * boxes small problems does the work: of one head
    each, as the kernel's outputs and gradients then lie in memory as they are read, which saves a tenth."""
    b, heads, count, d = q.shape
    words, first = plan.words, -(-plan.words // plan.tile)
    near = plan.keys[first:, first : plan.counts[-1]] - first  # (boxes, window); the first in each list are the words

    def seen(x):
        """(B, heads, N, d) -> (B * heads * boxes, 1, words + window * tile, d)"""
        x = x.reshape(b * heads, count, d)
        boxes = x[:, words:].reshape(b * heads, -1, plan.tile * d)  # (B * heads, boxes, tile * d)
        copied = boxes.index_select(1, near.flatten()).reshape(b * heads, len(near), -1, d)
        if words:
            copied = torch.cat((x[:, None, :words].expand(-1, len(near), -1, -1), copied), 2)
        return copied.reshape(-1, 1, words + near.shape[1] * plan.tile, d)

    boxes = q[:, :, words:].reshape(-1, 1, plan.tile, d)
    video = F.scaled_dot_product_attention(boxes, seen(k), seen(v)).reshape(b, heads, -1, d)
    return torch.cat((F.scaled_dot_product_attention(q[:, :, :words], k, v), video), 2) if words else video


# ---------------------------------------------------------------------------------------------------------------------
# Flash attention over tiles


def precise(x):
    """The dtype to sum in: float32, or x's own where it holds more."""
    return torch.promote_types(x.dtype, torch.float32)


def tiled_forward(q, k, v, keys, counts, words, tile):
    """-> (output like q, log-sum-exp of the logits (B, heads, N)). No more than tile x tile logits at a time.

    A softmax over keys that arrive tile by tile: `most` is the largest logit so far, `total` the sum of exp(logit -
    most), `mixed` the sum of exp(logit - most) v; when a tile brings a larger logit, what was summed fades."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=precise(q))
    columns = blocks(k.shape[2], words, tile)
    for i, rows in enumerate(blocks(q.shape[2], words, tile)):
        q_i = q[:, :, rows].to(lse.dtype) * q.shape[-1] ** -0.5
        most = torch.full_like(q_i[..., :1], -math.inf)
        total, mixed = torch.zeros_like(most), torch.zeros_like(q_i)
        for j in keys[i, : counts[i]].tolist():
            logits = q_i @ k[:, :, columns[j]].to(lse.dtype).transpose(-1, -2)  # (B, heads, tile, tile)
            higher = torch.maximum(most, logits.amax(-1, keepdim=True))
            weight, fade = torch.exp(logits - higher), torch.exp(most - higher)
            total = total * fade + weight.sum(-1, keepdim=True)
            mixed = mixed * fade + weight @ v[:, :, columns[j]].to(lse.dtype)
            most = higher
        out[:, :, rows], lse[:, :, rows] = (mixed / total).to(q.dtype), (most + total.log())[..., 0]
    return out, lse


def tiled_backward(grad, q, k, v, out, lse, keys, counts, words, tile):
    """Gradients of q, k and v. The weights are made again, from the log-sum-exp, tile by tile."""
    scale, columns = q.shape[-1] ** -0.5, blocks(k.shape[2], words, tile)
    grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
    inner = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)  # sum_j weight_ij d weight_ij, the softmax's own term
    for i, rows in enumerate(blocks(q.shape[2], words, tile)):
        q_i, grad_i = q[:, :, rows].to(lse.dtype), grad[:, :, rows].to(lse.dtype)
        for j in keys[i, : counts[i]].tolist():
            k_j, v_j = k[:, :, columns[j]].to(lse.dtype), v[:, :, columns[j]].to(lse.dtype)
            weight = torch.exp(q_i @ k_j.transpose(-1, -2) * scale - lse[:, :, rows, None])  # (B, heads, tile, tile)
            d_logits = weight * (grad_i @ v_j.transpose(-1, -2) - inner[:, :, rows]) * scale
            grads[0][:, :, rows] += d_logits @ k_j
            grads[1][:, :, columns[j]] += d_logits.transpose(-1, -2) @ q_i
            grads[2][:, :, columns[j]] += weight.transpose(-1, -2) @ grad_i
    return [x.to(q.dtype) for x in grads]


# What both operators take after their tensors: a plan's lists and sizes, and the backend
LISTS = "Tensor keys, Tensor counts, Tensor queries, Tensor query_counts, int words, int tile, str backend"


@torch.library.custom_op(
    "videoreward::tile_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {LISTS}) -> (Tensor, Tensor)",
)
def tile_attention(q, k, v, keys, counts, queries, query_counts, words, tile, backend):
    """Attention over the blocks of a plan, by backend "tiled" or "triton": -> (output, log-sum-exp). The lists from the
    keys' side are for the backward."""
    if backend == "triton":
        return kernels().forward(q, k, v, keys, counts, words, tile)
    return tiled_forward(q, k, v, keys, counts, words, tile)


@torch.library.custom_op(
    "videoreward::tile_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {LISTS}) -> (Tensor, Tensor, Tensor)",
)
def tile_attention_backward(grad, q, k, v, out, lse, keys, counts, queries, query_counts, words, tile, backend):
    """Gradients of q, k and v. It has no derivative of its own: a second backward raises."""
    if backend == "triton":
        lists = keys, counts, queries, query_counts
        return kernels().backward(grad, q, k, v, out, lse, *lists, words, tile)
    return tuple(tiled_backward(grad, q, k, v, out, lse, keys, counts, words, tile))


@tile_attention.register_fake
def _(q, k, v, *plan):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=precise(q))


@tile_attention_backward.register_fake
def _(grad, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output):
    *ctx.lists, ctx.words, ctx.tile, ctx.backend = inputs[3:]
    ctx.save_for_backward(*inputs[:3], *output)


def _gradients(ctx, grad, _):
    lists = *ctx.lists, ctx.words, ctx.tile, ctx.backend
    return *tile_attention_backward(grad, *ctx.saved_tensors, *lists), *[None] * 7


tile_attention.register_autograd(_gradients, setup_context=_keep)


def kernels():
    """The module of the Triton kernels. ValueError without Triton."""
    if not HAS_TRITON:
        raise ValueError("attention backend 'triton' needs the package triton, which comes with CUDA builds of torch")
    import attention_triton

    return attention_triton

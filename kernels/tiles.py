"""Sliding tiles: who sees whom, and attention that computes only that.

Sliding tile attention (arXiv 2502.04507) cuts the video into boxes of T x H x W tokens; all queries of a box see the
same boxes of keys, those around it. The window stops at the border instead of leaving it, so every box sees equally
many. Tokens must lie in the mask's order, box after box, the words of the prompt before them: words see everything and
everything sees them.

    gather   on any device: the keys that a tile of queries sees are copied together, then one sdpa call
    tiled    the algorithm of flash attention in readable PyTorch: online softmax over tiles, own backward
    triton   `tiled` as GPU kernels (tiles_triton.py): only the tiles in the mask are read, nothing is copied

`tiled` and `triton` are one custom op, which torch.compile traces. Their backward can not be differentiated again and
says so.
"""

import itertools
import math
import re
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

TILE = 64  # tokens of a block where there is no mask
KERNELS = {}  # "triton": the module tiles_triton, once attention has been asked for it

# ---------------------------------------------------------------------------------------------
# Plans: who sees whom


class TileMask(NamedTuple):
    """Blocks of at most `tile` tokens: first the words, cut as they come, then the boxes of the video."""

    words: int  # tokens before the video's
    tile: int  # tokens of a box
    order: (
        torch.Tensor
    )  # (video tokens,): the token, counted in (t, h, w) order, at each place of the mask's order
    inverse: torch.Tensor  # (video tokens,): x[:, order][:, inverse] is x
    keys: (
        torch.Tensor
    )  # (blocks, most) int32: the key blocks that each query block sees, then zeros
    counts: torch.Tensor  # (blocks,) int32: how many these are
    queries: torch.Tensor  # (blocks, most') int32: the same seen from the keys, for their gradients
    query_counts: torch.Tensor  # (blocks,) int32


def parse_attention(text):
    """ "full" -> None; "tile:T,H,W" or "tile:T,H,W/t,h,w" -> (tokens of a box, window in boxes; 3,3,3 if not given).
    ValueError for any other text."""
    if text == "full":
        return None
    three = r"(\d+),(\d+),(\d+)"
    found = re.fullmatch(f"tile:{three}(?:/{three})?", text)
    sides = [int(side or 3) for side in found.groups()] if found else [0]
    if min(sides) < 1:
        raise ValueError(
            "must be full, tile:T,H,W or tile:T,H,W/t,h,w, for example tile:2,4,4/1,3,3"
        )
    return tuple(sides[:3]), tuple(sides[3:])


@lru_cache
@torch.inference_mode(False)  # a mask made while sampling serves the next training, too
def tile_mask(text, grid, words, device):
    """The TileMask of `text` for video tokens on `grid` = (T, H, W) after `words` words; None for "full".

    ValueError if the grid is not a whole number of boxes. A window wider than the grid is cut to it."""
    if (parsed := parse_attention(text)) is None:
        return None
    box, window = parsed
    if any(n % side for n, side in zip(grid, box)):
        raise ValueError(f"{box} does not divide the grid of {grid} tokens (t, h, w)")
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
        starts = [
            min(max(x - w // 2, 0), n - w) for x, w, n in zip(at, window, boxes)
        ]  # stops at the border
        near = torch.zeros(boxes, dtype=torch.bool)
        near[tuple(slice(start, start + w) for start, w in zip(starts, window))] = True
        sees[first + i, first:] = near.flatten()
    tensors = order, order.argsort(), *_lists(sees), *_lists(sees.T)
    return TileMask(words, t * h * w, *(tensor.to(device) for tensor in tensors))


def _lists(sees):
    """Boolean (blocks, blocks) -> the columns of each row's true entries (blocks, most), how many (blocks,)."""
    counts = sees.sum(1)
    columns = sees.int().argsort(dim=1, descending=True, stable=True)[:, : counts.max()]
    return torch.where(
        torch.arange(columns.shape[1]) < counts[:, None], columns, 0
    ).int(), counts.int()


@lru_cache
@torch.inference_mode(False)
def dense_mask(queries, keys, device):
    """The mask of "full" for so many tokens: blocks of TILE, each of which sees all."""
    sees = torch.ones(-(-queries // TILE), -(-keys // TILE), dtype=torch.bool)
    none = torch.empty(0, dtype=torch.int64)
    return TileMask(-1, TILE, none, none, *(x.to(device) for x in (*_lists(sees), *_lists(sees.T))))


def blocks(count, words, tile):
    """Slices of `count` tokens: blocks of words, then boxes; `words` -1 for words alone."""
    words = count if words < 0 else words
    ends = (
        [*range(0, words, tile), *range(words, count + 1, tile)]
        if words < count
        else [*range(0, count, tile), count]
    )
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def boolean_mask(tiles, count):
    """Boolean (count, count): which keys each query sees. What the backends are tested against."""
    parts = blocks(count, tiles.words, tiles.tile)
    mask = torch.zeros(count, count, dtype=torch.bool, device=tiles.keys.device)
    for i, rows in enumerate(parts):
        for j in tiles.keys[i, : tiles.counts[i]].tolist():
            mask[rows, parts[j]] = True
    return mask


def gather(q, k, v, tiles):
    """Sliding tiles by copying: each box of queries gets the words and the boxes of keys it sees, side by side.

    All boxes see equally many, so that one dense call of B * heads * boxes small problems does the work: of one head
    each, as the kernel's outputs and gradients then lie in memory as they are read, which saves a tenth."""
    b, heads, count, d = q.shape
    words, first = tiles.words, -(-tiles.words // tiles.tile)
    near = (
        tiles.keys[first:, first : tiles.counts[-1]] - first
    )  # (boxes, window); the first in each list are the words

    def seen(x):
        """(B, heads, N, d) -> (B * heads * boxes, 1, words + window * tile, d)"""
        x = x.reshape(b * heads, count, d)
        boxes = x[:, words:].reshape(b * heads, -1, tiles.tile * d)  # (B * heads, boxes, tile * d)
        copied = boxes.index_select(1, near.flatten()).reshape(b * heads, len(near), -1, d)
        if words:
            copied = torch.cat((x[:, None, :words].expand(-1, len(near), -1, -1), copied), 2)
        return copied.reshape(-1, 1, words + near.shape[1] * tiles.tile, d)

    boxes = q[:, :, words:].reshape(-1, 1, tiles.tile, d)
    video = F.scaled_dot_product_attention(boxes, seen(k), seen(v)).reshape(b, heads, -1, d)
    return (
        torch.cat((F.scaled_dot_product_attention(q[:, :, :words], k, v), video), 2)
        if words
        else video
    )


# ---------------------------------------------------------------------------------------------
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
            logits = q_i @ k[:, :, columns[j]].to(lse.dtype).transpose(
                -1, -2
            )  # (B, heads, tile, tile)
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
    inner = (grad.to(lse.dtype) * out).sum(
        -1, keepdim=True
    )  # sum_j weight_ij d weight_ij, the softmax's own term
    for i, rows in enumerate(blocks(q.shape[2], words, tile)):
        q_i, grad_i = q[:, :, rows].to(lse.dtype), grad[:, :, rows].to(lse.dtype)
        for j in keys[i, : counts[i]].tolist():
            k_j, v_j = k[:, :, columns[j]].to(lse.dtype), v[:, :, columns[j]].to(lse.dtype)
            weight = torch.exp(
                q_i @ k_j.transpose(-1, -2) * scale - lse[:, :, rows, None]
            )  # (B, heads, tile, tile)
            d_logits = weight * (grad_i @ v_j.transpose(-1, -2) - inner[:, :, rows]) * scale
            grads[0][:, :, rows] += d_logits @ k_j
            grads[1][:, :, columns[j]] += d_logits.transpose(-1, -2) @ q_i
            grads[2][:, :, columns[j]] += weight.transpose(-1, -2) @ grad_i
    return [x.to(q.dtype) for x in grads]


# What both operators take after their tensors: a mask's lists and sizes, and the backend
LISTS = "Tensor keys, Tensor counts, Tensor queries, Tensor query_counts, int words, int tile, str backend"


@torch.library.custom_op(
    "videoreward::tile_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {LISTS}) -> (Tensor, Tensor)",
)
def tile_attention(q, k, v, keys, counts, queries, query_counts, words, tile, backend):
    """Attention over the blocks of a mask, by backend "tiled" or "triton": -> (output, log-sum-exp). The lists from the
    keys' side are for the backward."""
    if backend == "triton":
        return KERNELS[backend].forward(q, k, v, keys, counts, words, tile)
    return tiled_forward(q, k, v, keys, counts, words, tile)


@torch.library.custom_op(
    "videoreward::tile_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {LISTS}) -> (Tensor, Tensor, Tensor)",
)
def tile_attention_backward(
    grad, q, k, v, out, lse, keys, counts, queries, query_counts, words, tile, backend
):
    """Gradients of q, k and v. It has no derivative of its own: a second backward raises."""
    if backend == "triton":
        lists = keys, counts, queries, query_counts
        return KERNELS[backend].backward(grad, q, k, v, out, lse, *lists, words, tile)
    return tuple(tiled_backward(grad, q, k, v, out, lse, keys, counts, words, tile))


@tile_attention.register_fake
def _(q, k, v, *lists):
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

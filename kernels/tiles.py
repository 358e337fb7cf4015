"""Sliding tiles: which tokens see each other, and attention that computes only that.

Sliding tile attention (arXiv 2502.04507) cuts the video into boxes of T x H x W tokens. All queries
of a box see the same boxes of keys: a window around it, which stops at the border, so that every
box sees equally many. The words of the prompt see everything and everything sees them.

    gather   on any device: copies the keys that each box sees together, then one sdpa call
    tiled    flash attention in readable PyTorch: online softmax over tiles, with its own backward
    triton   `tiled` as GPU kernels (tiles_triton.py), which read only the tiles in the mask

`tiled` and `triton` are one custom op, which torch.compile traces. Their backward cannot be
differentiated again and says so.
"""

import itertools
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------
# The mask


def parse_attention(text, grid):
    """ "full" or "tile:T,H,W" or "tile:T,H,W/t,h,w" -> (box in tokens, window in boxes) on `grid`.

    The window is 3,3,3 unless given and is cut to the grid; "full" is one box. ValueError for any
    other text, and for a grid (T, H, W) that is not a whole number of boxes."""
    if text == "full":
        return tuple(grid), (1, 1, 1)
    three = r"(\d+),(\d+),(\d+)"
    found = re.fullmatch(f"tile:{three}(?:/{three})?", text)
    sides = [int(side or 3) for side in found.groups()] if found else []
    if not sides or min(sides) < 1:
        forms = "full, tile:T,H,W or tile:T,H,W/t,h,w, for example tile:2,4,4/1,3,3"
        raise ValueError(f"attention {text}: must be {forms}")
    box, window = tuple(sides[:3]), tuple(sides[3:])
    if any(n % side for n, side in zip(grid, box)):
        fault = f"{box} does not divide the grid of {tuple(grid)} tokens (t, h, w)"
        raise ValueError(f"attention {text}: {fault}")
    return box, tuple(min(w, n // side) for w, n, side in zip(window, grid, box))


class SlidingTiles(nn.Module):
    """Order and mask of `words` words followed by video tokens on `grid`, for an attention text.

    Tokens lie in blocks of at most `tile`: first the words, then the boxes of the video. The mask
    lists, for each block of queries, the blocks of keys that it sees, and the reverse:

        keys (blocks, most) int32, then zeros          counts (blocks,) int32: how many
        queries (blocks, most'), query_counts          the same seen from the keys

    With "full" the order is (t, h, w), every token sees all, and there are no lists."""

    def __init__(self, text, grid, words):
        super().__init__()
        self.box, window = parse_attention(text, grid)
        self.boxes = tuple(n // side for n, side in zip(grid, self.box))
        self.words = words
        self.tile = math.prod(self.box)
        self.full = text == "full"
        if self.full:
            return
        with torch.device("cpu"):  # also where the model is made without memory, on "meta"
            first = math.ceil(words / self.tile)  # blocks of words
            count = first + math.prod(self.boxes)
            t, h, w = (near(n, size) for n, size in zip(self.boxes, window))
            sees = torch.ones(count, count, dtype=torch.bool)
            sees[first:, first:] = torch.kron(torch.kron(t, h), w)
            lists = *block_lists(sees), *block_lists(sees.T)
        for name, value in zip(("keys", "counts", "queries", "query_counts"), lists):
            self.register_buffer(name, value, persistent=False)

    def lists(self):
        return [self.keys, self.counts, self.queries, self.query_counts]

    def sort(self, x):
        """Video tokens (B, N, d) in (t, h, w) order -> box after box."""
        (t, h, w), (bt, bh, bw) = self.boxes, self.box
        boxed = x.reshape(len(x), t, bt, h, bh, w, bw, x.shape[-1])
        return boxed.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(x.shape)

    def unsort(self, x):
        """The inverse of sort."""
        boxed = x.reshape(len(x), *self.boxes, *self.box, x.shape[-1])
        return boxed.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape)


def near(count, window):
    """(count, count) int: 1 where one of `count` boxes along an axis sees another."""
    i = torch.arange(count)
    start = (i - window // 2).clamp(0, count - window)[:, None]
    return ((i >= start) & (i < start + window)).int()


def block_lists(sees):
    """Boolean (blocks, blocks) -> the columns of each row's true entries, and their number."""
    counts = sees.sum(1)
    columns = sees.int().argsort(dim=1, descending=True, stable=True)[:, : counts.max()]
    exists = torch.arange(columns.shape[1]) < counts[:, None]
    return torch.where(exists, columns, 0).int(), counts.int()


def blocks(count, words, tile):
    """Slices of `count` tokens: blocks of words, the last cut short, then boxes."""
    ends = [*range(0, words, tile), *range(words, count + 1, tile)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def boolean_mask(tiles, count):
    """Boolean (count, count): which keys each query sees. The backends are tested against it."""
    parts = blocks(count, tiles.words, tiles.tile)
    mask = torch.zeros(count, count, dtype=torch.bool, device=tiles.keys.device)
    for i, rows in enumerate(parts):
        for j in tiles.keys[i, : tiles.counts[i]].tolist():
            mask[rows, parts[j]] = True
    return mask


# ---------------------------------------------------------------------------------------------
# Gather


def gather(q, k, v, tiles):
    """Sliding tiles by copying: each box of queries gets the words and the boxes of keys it sees.

    All boxes see equally many keys, so one dense call of B * heads * boxes small problems does the
    work. Each has one head: then outputs and gradients lie in memory as they are read."""
    b, heads, count, d = q.shape
    words, tile = tiles.words, tiles.tile
    first = math.ceil(words / tile)  # blocks of words, which open each list
    window = tiles.keys[first:, first : tiles.counts[-1]] - first  # (boxes, boxes in a window)

    def windows(x):
        """(B, heads, N, d) -> (B * heads * boxes, 1, words + tokens in a window, d)"""
        x = x.reshape(b * heads, count, d)
        boxes = x[:, words:].reshape(b * heads, -1, tile * d)
        copied = boxes.index_select(1, window.flatten())
        copied = copied.reshape(b * heads, len(window), -1, d)
        shared = x[:, None, :words].expand(-1, len(window), -1, -1)
        return torch.cat((shared, copied), 2).flatten(0, 1)[:, None]

    boxes = q[:, :, words:].reshape(-1, 1, tile, d)
    video = F.scaled_dot_product_attention(boxes, windows(k), windows(v))
    text = F.scaled_dot_product_attention(q[:, :, :words], k, v)
    return torch.cat((text, video.reshape(b, heads, -1, d)), 2)


# ---------------------------------------------------------------------------------------------
# Flash attention over tiles


def sum_dtype(x):
    """The dtype to sum in: float32, or x's own where it holds more."""
    return torch.promote_types(x.dtype, torch.float32)


def tiled_forward(q, k, v, lists, words, tile):
    """-> (output like q, log-sum-exp of the logits (B, heads, N)).

    Online softmax: keys arrive tile by tile. `highest` is the largest logit so far, `total` the sum
    of exp(logit - highest), `mixed` the sum of exp(logit - highest) v. When a tile brings a larger
    logit, both sums are scaled down."""
    keys, counts, _, _ = lists
    dtype = sum_dtype(q)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=dtype)
    q = q.to(dtype) * q.shape[-1] ** -0.5
    k = k.to(dtype)
    v = v.to(dtype)
    parts = blocks(q.shape[2], words, tile)
    for i, rows in enumerate(parts):
        q_i = q[:, :, rows]
        highest = torch.full_like(q_i[..., :1], -math.inf)
        total = torch.zeros_like(highest)
        mixed = torch.zeros_like(q_i)
        for j in keys[i, : counts[i]].tolist():
            k_j = k[:, :, parts[j]]
            v_j = v[:, :, parts[j]]
            logits = q_i @ k_j.mT  # (B, heads, tile, tile)
            higher = torch.maximum(highest, logits.amax(-1, keepdim=True))
            weight = torch.exp(logits - higher)
            fade = torch.exp(highest - higher)
            total = total * fade + weight.sum(-1, keepdim=True)
            mixed = mixed * fade + weight @ v_j
            highest = higher
        out[:, :, rows] = mixed / total
        lse[:, :, rows] = (highest + total.log())[..., 0]
    return out, lse


def tiled_backward(grad, q, k, v, out, lse, lists, words, tile):
    """Gradients of q, k and v. The weights are computed again, tile by tile, from `lse`."""
    keys, counts, _, _ = lists
    scale = q.shape[-1] ** -0.5
    grad, q, k, v = (x.to(lse.dtype) for x in (grad, q, k, v))
    d_q = torch.zeros_like(q)
    d_k = torch.zeros_like(k)
    d_v = torch.zeros_like(v)
    inner = (grad * out).sum(-1, keepdim=True)  # sum_j weight_ij d weight_ij
    parts = blocks(q.shape[2], words, tile)
    for i, rows in enumerate(parts):
        q_i = q[:, :, rows]
        grad_i = grad[:, :, rows]
        for j in keys[i, : counts[i]].tolist():
            columns = parts[j]
            k_j = k[:, :, columns]
            v_j = v[:, :, columns]
            logits = q_i @ k_j.mT * scale  # (B, heads, tile, tile)
            weight = torch.exp(logits - lse[:, :, rows, None])
            d_weight = grad_i @ v_j.mT
            d_logits = weight * (d_weight - inner[:, :, rows]) * scale  # softmax's derivative
            d_q[:, :, rows] += d_logits @ k_j
            d_k[:, :, columns] += d_logits.mT @ q_i
            d_v[:, :, columns] += weight.mT @ grad_i
    return d_q.to(out.dtype), d_k.to(out.dtype), d_v.to(out.dtype)


def kernels_of(backend):
    """The forward and backward of "tiled" or "triton"."""
    if backend == "triton":
        from kernels import tiles_triton  # only where Triton is installed

        return tiles_triton.forward, tiles_triton.backward
    return tiled_forward, tiled_backward


@torch.library.custom_op("videoreward::tile_attention", mutates_args=())
def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: list[Tensor], words: int, tile: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of a SlidingTiles -> (output, log-sum-exp), by backend "tiled" or
    "triton"."""
    forward, _ = kernels_of(backend)
    return forward(q, k, v, lists, words, tile)


@torch.library.custom_op("videoreward::tile_attention_backward", mutates_args=())
def tile_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lists: list[Tensor], words: int, tile: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v. An operator without a derivative: a second backward raises."""
    _, backward = kernels_of(backend)
    return backward(grad, q, k, v, out, lse, lists, words, tile)


@tile_attention.register_fake
def _(q, k, v, *settings):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=sum_dtype(q))


@tile_attention_backward.register_fake
def _(grad, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, ctx.lists, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, grad, _):
    gradients = tile_attention_backward(grad, *ctx.saved_tensors, ctx.lists, *ctx.settings)
    return *gradients, [None] * len(ctx.lists), None, None, None


tile_attention.register_autograd(_backward, setup_context=_save)

"""`tiles.tiled_forward` and `tiled_backward` as GPU kernels: flash attention over lists of blocks.

Only the key blocks in a query block's list are read. There are three kernels: the output, the
gradient of q (a program for each query block), the gradients of k and v (a program for each key
block, over the lists seen from the keys). Loops end at the count of their list: a guard inside the
loop would keep the compiler from loading the next block while it computes. Sums are float32, and
the exponential is the hardware's, of base 2.

Without a GPU the kernels run, slowly, in Triton's interpreter (TRITON_INTERPRET=1, in float32 and
float16; its bfloat16 is wrong) and compile ahead of time: tests/test_attention_triton.py.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(block, words, TILE: tl.constexpr):
    """The tokens of a block and which of them exist: blocks of words, the last cut short, then
    boxes of TILE."""
    first = tl.cdiv(words, TILE)  # blocks of words
    start = tl.where(block < first, block * TILE, words + (block - first) * TILE)
    stop = tl.where(block < first, tl.minimum(words, start + TILE), start + TILE)
    rows = start + tl.arange(0, TILE)
    return rows, rows < stop


@triton.jit
def _load(x, rows, exists, DIM: tl.constexpr):
    """Rows (TILE, DIM) of one head, zeros where there is no token."""
    places = x + rows[:, None] * DIM + tl.arange(0, DIM)[None]
    return tl.load(places, mask=exists[:, None], other=0.0)


@triton.jit
def _store(x, value, rows, exists, DIM: tl.constexpr):
    places = x + rows[:, None] * DIM + tl.arange(0, DIM)[None]
    tl.store(places, value.to(x.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _weights(q, k, lse, exists, scale):
    """softmax (TILE, TILE) from its log-sum-exp."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
    return tl.where(exists[None], tl.exp2(logits * LOG2_E), 0.0)


@triton.jit(do_not_specialize=["most", "words"])
def forward_kernel(
    q, k, v, out, lse, keys, counts, most, length, words, scale,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, exists = _span(i, words, TILE)
    q_i = _load(q + head * length * DIM, rows, exists, DIM)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    mixed = tl.zeros((TILE, DIM), tl.float32)
    for n in range(tl.load(counts + i)):
        columns, there = _span(tl.load(keys + i * most + n), words, TILE)
        k_j = _load(k + head * length * DIM, columns, there, DIM)
        v_j = _load(v + head * length * DIM, columns, there, DIM)
        logits = tl.dot(q_i, tl.trans(k_j), input_precision="ieee") * (scale * LOG2_E)
        logits = tl.where(there[None], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weight, fade = tl.exp2(logits - higher[:, None]), tl.exp2(highest - higher)
        total = total * fade + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(v_j.dtype), v_j, mixed * fade[:, None], input_precision="ieee")
        highest = higher
    _store(out + head * length * DIM, mixed / total[:, None], rows, exists, DIM)
    tl.store(lse + head * length + rows, (highest + tl.log2(total)) / LOG2_E, mask=exists)


@triton.jit(do_not_specialize=["most", "words"])
def query_kernel(
    q, k, v, grad, lse, inner, d_q, keys, counts, most, length, words, scale,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, exists = _span(i, words, TILE)
    q_i = _load(q + head * length * DIM, rows, exists, DIM)
    grad_i = _load(grad + head * length * DIM, rows, exists, DIM)
    lse_i = tl.load(lse + head * length + rows, mask=exists, other=0.0)
    inner_i = tl.load(inner + head * length + rows, mask=exists, other=0.0)
    total = tl.zeros((TILE, DIM), tl.float32)
    for n in range(tl.load(counts + i)):
        columns, there = _span(tl.load(keys + i * most + n), words, TILE)
        k_j = _load(k + head * length * DIM, columns, there, DIM)
        v_j = _load(v + head * length * DIM, columns, there, DIM)
        weight = _weights(q_i, k_j, lse_i, there, scale)
        d_weight = tl.dot(grad_i, tl.trans(v_j), input_precision="ieee")
        d_logits = weight * (d_weight - inner_i[:, None])
        total = tl.dot(d_logits.to(k_j.dtype), k_j, total, input_precision="ieee")
    _store(d_q + head * length * DIM, total * scale, rows, exists, DIM)


@triton.jit(do_not_specialize=["most", "words"])
def key_kernel(
    q, k, v, grad, lse, inner, d_k, d_v, queries, counts, most, length, words, scale,
    DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    j, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns, there = _span(j, words, TILE)
    k_j = _load(k + head * length * DIM, columns, there, DIM)
    v_j = _load(v + head * length * DIM, columns, there, DIM)
    total_k = tl.zeros((TILE, DIM), tl.float32)
    total_v = tl.zeros((TILE, DIM), tl.float32)
    for n in range(tl.load(counts + j)):
        rows, exists = _span(tl.load(queries + j * most + n), words, TILE)
        q_i = _load(q + head * length * DIM, rows, exists, DIM)
        grad_i = _load(grad + head * length * DIM, rows, exists, DIM)
        lse_i = tl.load(lse + head * length + rows, mask=exists, other=0.0)
        inner_i = tl.load(inner + head * length + rows, mask=exists, other=0.0)
        weight = _weights(q_i, k_j, lse_i, there, scale)  # a row that does not exist has grad 0
        total_v = tl.dot(tl.trans(weight.to(grad_i.dtype)), grad_i, total_v, input_precision="ieee")
        d_weight = tl.dot(grad_i, tl.trans(v_j), input_precision="ieee")
        d_logits = weight * (d_weight - inner_i[:, None])
        total_k = tl.dot(tl.trans(d_logits.to(q_i.dtype)), q_i, total_k, input_precision="ieee")
    _store(d_k + head * length * DIM, total_k * scale, columns, there, DIM)
    _store(d_v + head * length * DIM, total_v, columns, there, DIM)


def _launch(kernel, tensors, lists, counts, q, words, tile):
    """Runs `kernel` for each list and each head."""
    dim = q.shape[-1]
    grid = len(counts), q.shape[0] * q.shape[1]
    sizes = lists.shape[1], q.shape[2], words, dim**-0.5
    warps = 8 if dim * tile > 64 * 64 else 4
    settings = {"DIM": dim, "TILE": tile, "num_warps": warps, "num_stages": 2}
    kernel[grid](*tensors, lists, counts, *sizes, **settings)


def forward(q, k, v, lists, words, tile):
    """tiles.tiled_forward by a kernel."""
    keys, counts, _, _ = lists
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    _launch(forward_kernel, (q, k, v, out, lse), keys, counts, q, words, tile)
    return out, lse


def backward(grad, q, k, v, out, lse, lists, words, tile):
    """tiles.tiled_backward by two kernels."""
    keys, counts, queries, query_counts = lists
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    inner = (grad.float() * out.float()).sum(-1)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors = q, k, v, grad, lse, inner
    _launch(query_kernel, (*tensors, d_q), keys, counts, q, words, tile)
    _launch(key_kernel, (*tensors, d_k, d_v), queries, query_counts, q, words, tile)
    return d_q, d_k, d_v

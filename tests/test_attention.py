"""Attention: every backend against softmax in float64, sliding tiles against coordinates."""

import math

import pytest
import torch

from attention import attention
from kernels.tiles import SlidingTiles, boolean_mask, parse_attention
from model import ModelConfig

# text, grid, words before the video
TILES = [
    ("tile:1,4,4/1,3,3", (2, 16, 16), 21),  # two blocks of words, the second cut short
    ("tile:2,2,4/2,1,1", (4, 4, 8), 0),  # an even window, no words
    ("tile:2,2,2/9,9,9", (4, 4, 4), 8),  # words fill a block; a window wider than the grid
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def expected(q, k, v, mask=None):
    """Softmax attention in float64, by einsum."""
    logits = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = torch.where(mask, logits, -math.inf)
    return torch.einsum("bhnm,bhmd->bhnd", logits.softmax(-1), v.double())


def with_gradients(function, tensors, grad):
    """[output, gradient of each tensor] under the output gradient `grad`."""
    tensors = [x.clone().requires_grad_(True) for x in tensors]
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def check(tensors, tiles, mask, backend):
    dtype = tensors[0].dtype
    grad = torch.randn(tensors[0].shape).to(tensors[0])
    found = with_gradients(lambda *x: attention(*x, tiles, backend), tensors, grad)
    right = with_gradients(lambda *x: expected(*x, mask), [x.double() for x in tensors], grad)
    for x, y in zip(found, right):
        assert x.dtype == dtype
        assert (x.double() - y).abs().max() <= TOLERANCE[dtype] * y.abs().max()


def check_tiles(case, dtype, backend, dim=16, heads=2, device="cpu"):
    text, grid, words = case
    mask, _ = near(text, grid, words)
    q, k, v = torch.randn(3, 1, heads, words + math.prod(grid), dim).to(device, dtype)
    tiles = SlidingTiles(text, grid, words).to(device)
    check((q, k, v), tiles, mask.to(device), backend)


def near(text, grid, words):
    """(mask (N, N), order) of tokens in the order of tiles, from the coordinates of each token. A
    query sees the boxes within half a window of its own, counted from the nearest place where the
    whole window fits on the grid."""
    box, window = parse_attention(text, grid)
    place = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    box_of = [[x // side for x, side in zip(token, box)] for token in place]
    order = sorted(range(len(place)), key=lambda i: box_of[i])  # stable
    at = torch.tensor([box_of[i] for i in order])  # (video, 3)
    mask = torch.ones(words + len(at), words + len(at), dtype=torch.bool)
    for axis in range(3):
        width = window[axis]
        last = grid[axis] // box[axis] - width
        start = (at[:, axis] - width // 2).clamp(0, last)[:, None]
        mask[words:, words:] &= (at[None, :, axis] >= start) & (at[None, :, axis] < start + width)
    return mask, order


@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "sdpa32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_output_and_gradients(backend, dtype):
    torch.manual_seed(0)
    for n, m in ((90, 90), (7, 13)):
        tensors = [torch.randn(2, 3, count, 16).to(dtype) for count in (n, m, m)]
        check(tensors, None, None, backend)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "tiled", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_output_and_gradients(backend, dtype):
    torch.manual_seed(0)
    for case in TILES:
        check_tiles(case, dtype, backend)


@pytest.mark.parametrize("case", TILES)
def test_tiles_see_what_the_coordinates_say(case):
    text, grid, words = case
    tiles, (mask, order) = SlidingTiles(text, grid, words), near(text, grid, words)
    x = torch.arange(len(order))[None, :, None]
    assert tiles.sort(x).flatten().tolist() == order
    assert torch.equal(tiles.unsort(tiles.sort(x)), x)
    assert torch.equal(boolean_mask(tiles, len(mask)), mask)
    tiles.keys, tiles.counts = tiles.queries, tiles.query_counts
    assert torch.equal(boolean_mask(tiles, len(mask)), mask.T)


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        ("/1,1,2", [[0, 1], [0, 1], [1, 2], [2, 3], [3, 4]]),  # an even one reaches further back
        ("", [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]),  # 3,3,3 unless given
    ],
)
def test_windows_on_a_line_by_hand(window, seen):
    mask = boolean_mask(SlidingTiles("tile:1,1,1" + window, (1, 1, 5), 0), 5)
    assert [torch.nonzero(row).flatten().tolist() for row in mask] == seen


def test_a_second_backward_is_exact_in_naive_and_refused_elsewhere():
    tiles = SlidingTiles("tile:1,1,2/1,1,1", (1, 1, 4), 0)

    def twice(backend, tiles=None):
        x = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x.requires_grad_(True)
        return torch.autograd.gradgradcheck(
            lambda x: attention(x, x * 2, x.square(), tiles, backend), x
        )

    assert twice("naive") and twice("naive", tiles)
    for backend, each in (("sdpa", None), ("tiled", tiles)):
        with pytest.raises(RuntimeError):
            twice(backend, each)


def test_the_custom_op_is_sound_and_compiles_to_one_graph():
    torch.manual_seed(0)
    tiles = SlidingTiles("tile:1,2,2/1,1,1", (1, 2, 4), 1)
    tensors = [x.requires_grad_(True) for x in torch.randn(3, 1, 2, 9, 16)]
    arguments = (*tensors, tiles.lists(), tiles.words, tiles.tile, "tiled")
    torch.library.opcheck(torch.ops.videoreward.tile_attention.default, arguments)
    compiled = torch.compile(
        lambda *x: attention(*x, tiles, "tiled"), backend="aot_eager", fullgraph=True
    )
    assert torch.allclose(compiled(*tensors), attention(*tensors, tiles, "naive"), atol=1e-6)


def test_wrong_requests_are_named():
    q, k, v = torch.randn(3, 1, 1, 2, 4)
    for backend in ("flash9", "gather", "tiled"):  # unknown; without tiles
        with pytest.raises(ValueError, match=backend):
            attention(q, k, v, backend=backend)
    for text in ("tile:2,2", "tile:0,2,2", "tile:2,2,2/3,0,3", "sparse"):
        with pytest.raises(ValueError, match=f"attention {text}: must be full, tile:T,H,W"):
            ModelConfig(attention=text)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) does not divide the grid of \(4, 4, 4\)"):
        ModelConfig(attention="tile:2,3,4")

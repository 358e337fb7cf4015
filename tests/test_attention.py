"""Attention: every backend against softmax in float64, sliding tiles against a mask by coordinates, positions."""

import math

import pytest
import torch

from attention import attention
from kernels.tiles import blocks, boolean_mask, parse_attention, tile_mask
from model import ModelConfig
from runtime.cli import BadInput

CPU = torch.device("cpu")
# a plan, its grid, words before the video
DENSE = ("full", (3, 4, 5), 0)
TILES = [
    ("tile:2,2,2", (4, 8, 8), 8),  # words fill a block
    ("tile:1,4,4/1,3,3", (2, 16, 16), 21),  # two blocks of words, the second cut short
    ("tile:2,2,4/2,1,1", (4, 4, 8), 0),  # an even window, no words
    ("tile:2,4,4/9,9,9", (4, 8, 8), 5),  # a window wider than the grid: dense
]


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


def check(tensors, plan, mask, backend, tolerance):
    grad = torch.randn(tensors[0].shape).to(tensors[0])
    found = with_gradients(lambda *x: attention(*x, plan, backend), tensors, grad)
    wanted = with_gradients(lambda *x: expected(*x, mask), [x.double() for x in tensors], grad)
    assert all(x.dtype == tensors[0].dtype for x in found)
    for x, y in zip(found, wanted):
        assert (x.double() - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "sdpa32", "tiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("n", "m"), [(64, 64), (7, 13), (70, 129)])
def test_dense_output_and_gradients(backend, dtype, tolerance, n, m):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, count, 16).to(dtype) for count in (n, m, m))
    check((q, k, v), None, None, backend, tolerance)


@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa", "sdpa32", "tiled", "gather"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("case", TILES)
def test_tiles_output_and_gradients(backend, dtype, tolerance, case):
    torch.manual_seed(0)
    text, grid, words = case
    mask, _ = near(text, grid, words)
    q, k, v = torch.randn(3, 1, 2, words + math.prod(grid), 16).to(dtype)
    check((q, k, v), tile_mask(text, grid, words, CPU), mask, backend, tolerance)


def near(text, grid, words):
    """(mask (N, N), order) of tokens in the plan's order, from the coordinates of each: a query sees the boxes within
    half a window of its own, counted from the nearest place where the whole window fits on the grid."""
    box, window = parse_attention(text)
    boxes = [n // side for n, side in zip(grid, box)]
    place = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    order = sorted(
        range(len(place)), key=lambda i: [x // side for x, side in zip(place[i], box)]
    )  # stable
    at = torch.tensor(
        [[x // side for x, side in zip(place[i], box)] for i in order]
    )  # (video, 3): each token's box
    mask = torch.ones(words + len(at), words + len(at), dtype=torch.bool)
    for axis in range(3):
        width = min(window[axis], boxes[axis])
        start = (at[:, axis] - width // 2).clamp(0, boxes[axis] - width)[:, None]
        mask[words:, words:] &= (at[None, :, axis] >= start) & (at[None, :, axis] < start + width)
    return mask, order


@pytest.mark.parametrize("case", TILES)
def test_a_plan_sees_what_the_coordinates_say(case):
    text, grid, words = case
    plan, (mask, order) = tile_mask(text, grid, words, CPU), near(text, grid, words)
    assert plan.order.tolist() == order and torch.equal(
        plan.order[plan.inverse], torch.arange(len(order))
    )
    assert torch.equal(boolean_mask(plan, len(mask)), mask)
    seen_from_keys = boolean_mask(
        plan._replace(keys=plan.queries, counts=plan.query_counts), len(mask)
    )
    assert torch.equal(seen_from_keys, mask.T)
    boxes = plan.counts[-(-words // plan.tile) :]
    assert (
        boxes == boxes[0]
    ).all()  # every box sees equally many: `gather` and balanced GPU programs need it


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        (
            "/1,1,2",
            [[0, 1], [0, 1], [1, 2], [2, 3], [3, 4]],
        ),  # an even one reaches further back than ahead
        ("/2,4,1", [[0], [1], [2], [3], [4]]),
        ("/1,1,4", [[0, 1, 2, 3]] * 3 + [[1, 2, 3, 4]] * 2),
        ("", [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]),  # three boxes unless told
    ],
)
def test_windows_on_a_line_by_hand(window, seen):
    mask = boolean_mask(tile_mask("tile:1,1,1" + window, (1, 1, 5), 0, CPU), 5)
    assert [torch.nonzero(row).flatten().tolist() for row in mask] == seen


def test_blocks_by_hand():
    assert blocks(22, 6, 4) == [
        slice(0, 4),
        slice(4, 6),
        *(slice(i, i + 4) for i in (6, 10, 14, 18)),
    ]
    assert blocks(10, -1, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert blocks(8, 0, 4) == [slice(0, 4), slice(4, 8)]


@pytest.mark.parametrize("case", [DENSE, ("tile:1,2,2/1,1,1", (1, 2, 4), 1)])
def test_gradients_of_tiled_are_those_of_finite_differences(case):
    torch.manual_seed(0)
    text, grid, words = case
    plan = tile_mask(text, grid, words, CPU)
    tensors = [x.requires_grad_(True) for x in torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, plan, "tiled"), tensors)


def test_a_second_backward_is_exact_in_naive_and_refused_elsewhere():
    def twice(backend):
        x = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x.requires_grad_(True)
        return torch.autograd.gradgradcheck(
            lambda x: attention(x, x * 2, x.square(), None, backend), x
        )

    assert twice("naive")
    for backend in ("sdpa", "tiled"):
        with pytest.raises(RuntimeError):
            twice(backend)


def test_the_custom_op_is_sound_and_compiles_to_one_graph():
    torch.manual_seed(0)
    plan = tile_mask("tile:1,2,2/1,1,1", (1, 2, 4), 1, CPU)
    tensors = [x.requires_grad_(True) for x in torch.randn(3, 1, 2, 9, 16)]
    arguments = (*tensors, *plan[4:], plan.words, plan.tile, "tiled")
    torch.library.opcheck(torch.ops.videoreward.tile_attention.default, arguments)
    compiled = torch.compile(
        lambda *x: attention(*x, plan, "tiled").square(), backend="aot_eager", fullgraph=True
    )
    assert torch.allclose(
        compiled(*tensors), attention(*tensors, plan, "naive").square(), atol=1e-6
    )


@pytest.mark.parametrize("backend", ["flash9", "gather"])
def test_a_backend_that_is_unknown_or_lacks_a_plan_is_named(backend):
    with pytest.raises(ValueError, match=backend):
        attention(*torch.randn(3, 1, 1, 2, 4), backend=backend)


@pytest.mark.parametrize(
    "text", ["tile", "tile:2,2", "tile:0,2,2", "tile:2,2,2/3,0,3", "tile:2,2,2,2", "sparse"]
)
def test_a_wrong_attention_is_refused(text):
    with pytest.raises(ValueError, match="must be full, tile:T,H,W"):
        parse_attention(text)
    with pytest.raises(BadInput, match=f"--attention {text}: must be full, tile:T,H,W"):
        ModelConfig(attention=text)


def test_a_box_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) does not divide the grid of \(4, 8, 8\)"):
        tile_mask("tile:2,3,4", (4, 8, 8), 0, CPU)
    with pytest.raises(BadInput, match=r"--attention tile:2,3,4: \(2, 3, 4\) does not divide"):
        ModelConfig(frames=8, attention="tile:2,3,4")

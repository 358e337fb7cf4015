"""The GPU kernels on a GPU, or else in Triton's interpreter, and as machine code."""

import os
import subprocess
import sys

import pytest
import torch

from tests.test_attention import TOLERANCE, check_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
triton = pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case", [("tile:1,4,4/1,2,1", (1, 12, 8), 21), ("tile:2,2,4", (2, 4, 4), 0)]
)
def test_output_and_gradients(dtype, case):
    torch.manual_seed(0)
    check_tiles(case, dtype, "triton", heads=1, device=DEVICE)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(
    "case", [("tile:1,8,8/1,3,3", (2, 32, 32), 77), ("tile:2,8,8/3,1,1", (8, 16, 16), 8)]
)
def test_long_sequences_on_a_gpu(case, dim, dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-5)
    check_tiles(case, dtype, "auto", dim, heads=3, device=DEVICE)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import tiles_triton

types = {"lse": "*fp32", "inner": "*fp32", "scale": "fp32", "DIM": "constexpr", "TILE": "constexpr"}
types |= dict.fromkeys(("keys", "counts", "queries"), "*i32")
types |= dict.fromkeys(("most", "length", "words"), "i32")
for name in ("forward_kernel", "query_kernel", "key_kernel"):
    kernel = getattr(tiles_triton, name)
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}  # as torch allocates
    source = ASTSource(kernel, signature, {"DIM": 64, "TILE": 64}, aligned)
    code = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "num_stages": 2})
    print("wgmma" in code.asm["ptx"], "cp.async" in code.asm["ptx"], len(code.asm["cubin"]) > 0)
"""


def test_the_kernels_compile_for_a_gpu_use_tensor_cores_and_load_ahead():
    settings = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=settings
    )
    assert run.stdout.splitlines() == ["True True True"] * 3, run.stderr

"""The GPU kernels on a GPU, or else in Triton's interpreter, and as machine code."""

import json
import os
import subprocess
import sys

import pytest
import torch

from attention import attention
from tests.test_attention import TOLERANCE, check, check_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
triton = pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case", [None, ("tile:1,4,4/1,2,1", (1, 12, 8), 21), ("tile:2,2,4", (2, 4, 4), 0)]
)
def test_output_and_gradients(dtype, case):
    torch.manual_seed(0)
    if case is None:  # dense, the last block cut short
        return check(torch.randn(3, 1, 2, 70, 16).to(DEVICE, dtype), None, None, "triton")
    check_tiles(case, dtype, "triton", heads=1, device=DEVICE)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize(
    "case", [None, ("tile:1,8,8/1,3,3", (2, 32, 32), 77), ("tile:2,8,8/3,1,1", (8, 16, 16), 8)]
)
def test_long_sequences_on_a_gpu(case, dim, dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-5)
    if case is None:
        return check(torch.randn(3, 2, 3, 777, dim).to(DEVICE, dtype), None, None, "triton")
    check_tiles(case, dtype, "auto", dim, heads=3, device=DEVICE)


def test_sizes_that_the_kernels_do_not_take_are_named():
    with pytest.raises(ValueError, match="head size 24"):
        attention(*torch.randn(3, 1, 1, 8, 24), backend="triton")


COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import tiles_triton as attention_triton

tool = next(Path(triton.__file__).parent.rglob("cuobjdump"), None) or sys.exit("no cuobjdump")
types = {"lse": "*fp32", "inner": "*fp32", "keys": "*i32", "counts": "*i32", "queries": "*i32", "scale": "fp32"}
types |= dict.fromkeys(("most", "length", "words"), "i32") | dict.fromkeys(("DIM", "TILE"), "constexpr")
for name in ("forward_kernel", "query_kernel", "key_kernel"):
    kernel = getattr(attention_triton, name)
    signature = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(kernel, signature, {"DIM": 64, "TILE": 64}, aligned)  # pointers aligned as torch allocates
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target, {"num_warps": 4, "num_stages": 2})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = {word: len(re.findall(rf"\\b{word}\\b", code)) for word in ("HGMMA", "LDGSTS", "LDL", "STL")}
    print(json.dumps({"kernel": name, **found}))
"""


def test_machine_code_uses_tensor_cores_and_does_not_spill():
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=settings
    )
    if "no cuobjdump" in done.stderr:
        pytest.skip("this build of triton has no cuobjdump")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    for code in found:
        assert code["HGMMA"] > 0, code
        assert code["LDGSTS"] > 0, code  # the next block is loaded while this one is computed
        assert code["LDL"] == code["STL"] == 0, code  # registers hold everything

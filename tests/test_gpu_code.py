"""The machine code of the GPU kernels has no spills, and its registers, shared memory and 16-byte
accesses are within gpu_budget.json. The numbers hold for one compiler version: with another Triton
or nvcc than the budget's, only spills are checked."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from importlib.metadata import version

import gpu_code
import pytest
from gpu_code import ARCHITECTURES, Code, Codes

BUDGET = gpu_code.load_budget()

#: Loads and stores 16 bytes per thread, and indexes an array that registers cannot hold.
KNOWN = """
.version 7.0
.target sm_80
.address_size 64
.visible .entry known(.param .u64 data)
{
    .local .align 16 .b8 array[64];
    .reg .b64 %at, %place;
    .reg .b32 %x, %y, %z, %w, %which;
    ld.param.u64 %at, [data];
    cvta.to.global.u64 %at, %at;
    ld.global.v4.u32 {%x, %y, %z, %w}, [%at];
    and.b32 %which, %x, 60;
    cvt.u64.u32 %place, %which;
    mov.u64 %at, array;
    add.u64 %place, %place, %at;
    st.local.u32 [%place], %w;
    ld.local.u32 %w, [array + 8];
    ld.param.u64 %at, [data];
    cvta.to.global.u64 %at, %at;
    st.global.v4.u32 [%at], {%x, %y, %z, %w};
    ret;
}
"""


@pytest.fixture(scope="module")
def compiling():
    """By architecture, the process that compiles the Triton kernels. They run side by side, and
    not in this process, because here Triton may run its interpreter."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {
        arch: subprocess.Popen(
            [sys.executable, gpu_code.__file__, "triton", "--arch", str(arch)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for arch in ARCHITECTURES
    }  # fmt: skip


def triton_code(process: subprocess.Popen) -> Codes:
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return {name: Code(**code) for name, code in ast.literal_eval(out).items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_triton_kernels(arch, compiling):
    codes = triton_code(compiling[arch])
    assert gpu_code.spilled(codes, arch) == []
    if version("triton") == BUDGET.made_with["triton"]:
        assert gpu_code.over_budget(codes, arch, BUDGET.triton) == []


def test_every_triton_kernel_is_in_the_budget():
    compiled = {name.rpartition(": ")[2] for name in BUDGET.triton}
    launched = {
        f"{file.stem}.{call.func.value.id}"
        for file in (gpu_code.ROOT / "kernels").glob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)
    }
    assert launched and compiled == launched


def test_cuda_kernels():
    if not gpu_code.LIBRARY.exists():
        pytest.skip("the CUDA library was not built: no nvcc that fits torch")
    found = gpu_code.cuda_code()
    recipe = runpy.run_path(str(gpu_code.ROOT / "setup.py"), run_name="setup")
    default = os.environ.get("TORCH_CUDA_ARCH_LIST") or recipe["ARCHITECTURES"]
    wanted = [round(10 * float(arch.removesuffix("+PTX"))) for arch in default.split(";")]
    assert sorted(found) == wanted
    for arch, codes in found.items():
        assert gpu_code.spilled(codes, arch) == []
        if arch in ARCHITECTURES and gpu_code.nvcc_release() == BUDGET.made_with["nvcc"]:
            assert gpu_code.over_budget(codes, arch, BUDGET.cuda) == []


def test_known_code_is_read(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "known.ptx").write_text(KNOWN)
    cubin = tmp_path / "known.cubin"
    gpu_code.output(gpu_code.tool("ptxas"), "-arch=sm_80", tmp_path / "known.ptx", "-o", cubin)
    ((code,),) = (codes.values() for codes in gpu_code.read_code([cubin.read_bytes()], 80))
    assert (code.wide_loads, code.wide_stores, code.stack) == (1, 1, 64)
    assert code.spills >= 2
    assert len(gpu_code.spilled({"known": code}, 80)) == 2


def test_budget_is_a_limit():
    budget = {"k": {"90": [100, 1000, 2, 0]}}
    fits = Code(registers=110, shared=1100, wide_loads=2, wide_stores=1)
    assert gpu_code.over_budget({"k": fits}, 90, budget) == []
    worse = Code(registers=111, shared=1101, wide_loads=1)
    lines = gpu_code.over_budget({"k": worse}, 90, budget)
    assert [line.split()[2] for line in lines] == ["registers", "shared", "wide_loads"]
    assert "not in the budget" in gpu_code.over_budget({"new": fits}, 90, {})[0]
    assert "not compiled" in gpu_code.over_budget({}, 90, budget)[0]

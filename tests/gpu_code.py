"""Registers, shared memory, spills and wide memory accesses of the GPU kernels, read from their
machine code. Triton kernels are compiled here; CUDA C++ kernels are read from the built library. No
GPU is needed.

    python tests/gpu_code.py update              rewrites gpu_budget.json
    python tests/gpu_code.py triton --arch 90    prints the numbers of the Triton kernels

test_gpu_code.py checks that the kernels stay within the budget.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("gpu_budget.json")
LIBRARY = ROOT / "elf_fast/_native_cuda.so"

#: Compute capabilities in the budget.
ARCHITECTURES = (80, 90, 100)

#: Share by which registers and shared memory may exceed their budget.
SLACK = 0.1


@dataclass
class Code:
    """One kernel on one architecture. `spills` counts the instructions that access local memory."""

    registers: int = 0
    shared: int = 0  # bytes; CUDA C++: static ones, plus 1024 that sm_90 and later reserve
    wide_loads: int = 0  # instructions that read 16 bytes or more per thread from global memory
    wide_stores: int = 0
    stack: int = 0  # bytes
    spills: int = 0


COLUMNS = ("registers", "shared", "wide_loads", "wide_stores")

#: Code by name of the kernel.
Codes = dict[str, Code]


@dataclass
class Budget:
    """The numbers of COLUMNS by kernel and architecture, and the compilers that produced them."""

    made_with: dict[str, str | None]
    triton: dict[str, dict[str, list[int]]]
    cuda: dict[str, dict[str, list[int]]]


def load_budget() -> Budget:
    loaded = json.loads(BUDGET.read_text())
    assert tuple(loaded.pop("columns")) == COLUMNS
    return Budget(**loaded)


def save_budget(budget: Budget) -> None:
    """Writes one line per kernel."""
    parts = ['"columns": ' + json.dumps(COLUMNS)]
    parts.append('"made_with": ' + json.dumps(budget.made_with, sort_keys=True))
    for part in ("cuda", "triton"):
        rows = sorted(getattr(budget, part).items())
        lines = [f"{json.dumps(name)}: {json.dumps(of_arch)}" for name, of_arch in rows]
        parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n}" if lines else f'"{part}": {{}}')
    BUDGET.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def spilled(codes: Codes, arch: int) -> list[str]:
    """A line for each kernel that uses local memory."""
    return [
        f"{kernel}, sm_{arch}: {name} {getattr(code, name)}, allowed 0"
        for kernel, code in codes.items()
        for name in ("stack", "spills")
        if getattr(code, name)
    ]


def over_budget(codes: Codes, arch: int, budget: dict[str, dict[str, list[int]]]) -> list[str]:
    """A line for each number beyond the budget, and for each kernel that only one side has."""
    key, lines = str(arch), []
    update = "if that is meant, run: python tests/gpu_code.py update"
    for kernel in sorted({*codes, *(k for k, of_arch in budget.items() if key in of_arch)}):
        if kernel not in codes:
            lines.append(f"{kernel}, sm_{arch}: in the budget but not compiled; {update}")
        elif key not in budget.get(kernel, {}):
            lines.append(f"{kernel}, sm_{arch}: not in the budget; {update}")
        else:
            for name, allowed in zip(COLUMNS, budget[kernel][key], strict=True):
                got = getattr(codes[kernel], name)
                if name.startswith("wide"):
                    bad, limit = got < allowed, "at least"
                else:
                    bad, limit = got > int(allowed * (1 + SLACK)), f"at most {SLACK:.0%} above"
                if bad:
                    lines.append(f"{kernel}, sm_{arch}: {name} {got}, allowed {limit} {allowed}")
    return lines


def tool(name: str) -> str:
    """The path of a CUDA binary utility. Triton includes those that a toolkit may lack."""
    spec = importlib.util.find_spec("triton")
    brought = Path(spec.origin).parent / f"backends/nvidia/bin/{name}" if spec else Path(name)
    return str(brought) if brought.exists() else name


def machine_code(cubin: bytes) -> dict[str, bytes]:
    """Machine code by function: the sections `.text.<function>` of an ELF file."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    found = {}
    for at, _, _, _, offset, length in headers:
        at += headers[of_names][4]
        name = cubin[at : cubin.index(0, at)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def read_code(cubins: list[bytes], arch: int) -> list[Codes]:
    """For each cubin, Code by mangled function name.

    All instructions go to the disassembler in one call, because its start takes longer than its
    work on one cubin.
    """
    found: list[Codes] = []
    instructions, ends = b"", []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        for cubin in cubins:
            file.write_bytes(cubin)
            usage = output(tool("cuobjdump"), "-res-usage", file)
            instructions_of, codes = machine_code(cubin), {}
            for function, regs, stack, shared in re.findall(
                r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage
            ):
                codes[function] = Code(int(regs), int(shared), stack=int(stack))
                instructions += instructions_of[function]
                ends.append((len(instructions), codes[function]))
            found.append(codes)
        file.write_bytes(instructions)
        model = f"SM{arch}a" if arch >= 90 else f"SM{arch}"
        sass = output(tool("nvdisasm"), "-b", model, file)
    last, which = -1, 0
    for at, name, modifiers in re.findall(r"/\*(\w+)\*/ +(?:@\S+ +)?(\w+)(\S*)", sass):
        last = int(at, 16)
        which += last >= ends[which][0]
        code = ends[which][1]
        wide = re.search(r"\.(128|256)\b", modifiers) is not None
        code.wide_loads += wide and name in ("LDG", "LDGSTS")
        code.wide_stores += wide and name == "STG"
        code.spills += name in ("LDL", "STL")
    assert which == len(ends) - 1 and last + 16 == len(instructions), "the disassembly is not whole"
    return found


def output(*command: str | Path, cwd: str | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


# Triton


def triton_calls() -> Iterator[tuple[str, Callable[..., object], tuple]]:
    """Calls whose kernels are compiled: description, function and arguments.

    Tensors are on the meta device, except that most thresholds and temperatures are on the CPU.
    """
    from kernels import compact, exit_gate, exit_head, exit_loss

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def indices(*shape: int) -> torch.Tensor:
        return empty(*shape, dtype=torch.int64)

    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    t, T = torch.tensor(0.5), torch.tensor(1.0)
    confidence, margin, entropy = range(3)

    def gate(shape: tuple[int, int], dtype: torch.dtype, criterion: int = confidence):
        return exit_gate.exit_gate, (empty(*shape, dtype=dtype), t, T, criterion, None, False)

    for shape, dtype in product(((256, 1000), (16, 10), (4, 8142), (5000, 100)), (f32, bf16)):
        yield f"exit_gate {list(shape)} {dtype}", *gate(shape, dtype)
    yield "exit_gate [256, 1000] torch.float64", *gate((256, 1000), f64)
    yield "exit_gate margin [256, 1000] torch.float32", *gate((256, 1000), f32, margin)
    yield "exit_gate entropy [256, 1000] torch.float32", *gate((256, 1000), f32, entropy)
    settings = (empty(1000), empty(), confidence, indices(256), False)
    on_device = "exit_gate, settings and target on the device, [256, 1000] torch.float32"
    yield on_device, exit_gate.exit_gate, (empty(256, 1000), *settings)

    for dtype, layout in product((f32, bf16), ("contiguous", "channels-last")):
        x = empty(64, 512, 7, 7, dtype=dtype)
        if layout == "channels-last":
            x = x.to(memory_format=torch.channels_last)
        head = (x, empty(1000, 512, dtype=dtype), empty(1000, dtype=dtype), t, T, confidence, None)
        for with_logits in (False, True):
            name = f"exit_head {layout} [64, 512, 7, 7] {dtype}{' logits' * with_logits}"
            yield name, exit_head.exit_head, (*head, False, with_logits)

    x, survivors, count = empty(64, 256, 7, 7), indices(32), indices()
    odd = empty(64, 147, dtype=torch.uint8)
    for batch in (x, odd):
        what = f"{list(batch.shape)} {batch.dtype}"
        yield f"compact {what}", compact.compact, (batch, survivors)
        yield f"compact_ {what}", compact.compact_, (batch, survivors, None)
        yield f"compact_backward {what}", compact.compact_backward, (batch[:32], survivors, 64)
    what = f"{list(x.shape)} {x.dtype}"
    yield f"compact_into {what} count", compact.compact_into, (x[:32], x, survivors, count)
    yield f"compact_ {what} count", compact.compact_, (x, survivors, count)

    N, C = 256, 1000
    vector, y = empty(C), indices(N)
    families = {
        "cross-entropy": (None, None, None, 0.0, 1.0, 0.0),
        "all of it": (vector, vector, vector, 1.5, 2.0, 0.1),
    }
    for dtype, (name, family) in product((f32, bf16), families.items()):
        what, z = f"{name} [{N}, {C}] {dtype}", empty(N, C, dtype=dtype)
        yield f"exit_loss {what}", exit_loss.exit_loss, (z, y, *family, t, T, confidence)
        back = (empty(N), z, y, empty(N), *family)
        yield f"exit_loss_backward {what}", exit_loss.exit_loss_backward, back


def triton_code(arch: int) -> Codes:
    """Compiles the kernels that `triton_calls` would launch on a device of this architecture."""
    os.environ.pop("TRITON_INTERPRET", None)  # read by the decorators of the kernels
    sys.path.insert(0, str(ROOT))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = CUDABackend(target)
    launches: list[tuple[JITFunction, tuple, dict[str, Any]]] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    def compiled(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Does what JITFunction.run does, but without a device."""
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, *signature = kernel._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(kernel, *signature)
        return triton.compile(source, target=target, options=options.__dict__)

    binaries: dict[str, Any] = {}
    seen: set[str] = set()
    for call, function, args in triton_calls():
        launches.clear()
        with mock.patch.object(JITFunction, "run", record):
            function(*args)
        for launch in launches:
            binary = compiled(*launch)
            if binary.hash in seen:
                continue
            seen.add(binary.hash)
            kernel = f"{launch[0].__module__}.{launch[0].__name__}".removeprefix("kernels.")
            name = f"{call.replace('torch.', '')}: {kernel}"
            assert name not in binaries, f"two kernels with the name {name}"
            binaries[name] = binary
    read = read_code([binary.asm["cubin"] for binary in binaries.values()], arch)
    codes: Codes = {}
    for (name, binary), of_function in zip(binaries.items(), read, strict=True):
        (codes[name],) = of_function.values()
        codes[name].shared = binary.metadata.shared
    return codes


# CUDA C++


def cuda_code() -> dict[int, Codes]:
    """Code in the built library by architecture and function name."""
    cubins: dict[int, list[bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        output(tool("cuobjdump"), "-xelf", "all", LIBRARY, cwd=folder)
        for file in Path(folder).glob("*.cubin"):
            arch = int(re.search(r"sm_(\d+)", file.name)[1])
            cubins.setdefault(arch, []).append(file.read_bytes())
    with ThreadPool() as pool:  # the disassembler is a process of its own
        read = pool.starmap(read_code, [(of_arch, arch) for arch, of_arch in cubins.items()])
    found: dict[int, Codes] = {}
    for arch, of_arch in zip(cubins, read, strict=True):
        named = [
            (name, code)
            for codes in of_arch
            for name, code in zip(demangled(*codes), codes.values(), strict=True)
        ]
        found[arch] = dict(named)
        assert len(named) == len(found[arch]), "kernels of one name"
    return found


def nvcc_release() -> str | None:
    """The release of the nvcc on PATH, which built the library."""
    if shutil.which("nvcc") is None:
        return None
    return re.search(r"release (\d+\.\d+)", output("nvcc", "--version"))[1]


def demangled(*functions: str) -> list[str]:
    """Demangled names without arguments and namespaces."""
    names = output(shutil.which("cu++filt") or "c++filt", "-p", *functions)
    return re.sub(r"\(anonymous namespace\)::|elf_fast::", "", names).splitlines()


def update() -> None:
    def rows(of_arch: dict[int, Codes]) -> dict[str, dict[str, list[int]]]:
        out: dict[str, dict[str, list[int]]] = {}
        for arch, codes in sorted(of_arch.items()):
            for line in spilled(codes, arch):
                print(line)
            for kernel, code in codes.items() if arch in ARCHITECTURES else ():
                numbers = [getattr(code, column) for column in COLUMNS]
                out.setdefault(kernel, {})[str(arch)] = numbers
        return out

    triton = rows({arch: triton_code(arch) for arch in ARCHITECTURES})
    made_with = {"triton": version("triton"), "nvcc": nvcc_release()}
    save_budget(Budget(made_with, triton, rows(cuda_code())))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("update")
    commands.add_parser("triton").add_argument("--arch", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.command == "update":
        update()
    else:
        print(json.dumps({k: asdict(c) for k, c in triton_code(arguments.arch).items()}))

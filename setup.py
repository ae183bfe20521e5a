"""Builds the native libraries; all other settings of the package are in pyproject.toml.

ELF_FAST_BUILD chooses what is compiled: `auto` (the default: the CPU library, and the CUDA one if
an nvcc fits torch), `cuda` (both, or an error), `cpu`, or `none`. CXX, CUDA_HOME, MAX_JOBS and
TORCH_CUDA_ARCH_LIST are respected. No GPU is needed to build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

MODES = ("auto", "cuda", "cpu", "none")
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
CGROUP = "/sys/fs/cgroup/memory.max"

# The sources use the stable ABI of the oldest torch only, so that one wheel fits every later torch.
OLDEST_TORCH = (2, 11)
COMMON = "-std=c++20 -O3 -DTORCH_TARGET_VERSION=0x020b000000000000"

# No -march, because instruction sets are chosen at run time. GCC 12 warns falsely about its own
# AVX-512 intrinsics (uninitialized) and about vector types (attributes, psabi).
CXX_FLAGS = (
    f"{COMMON} -g0 -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wno-psabi -Wno-unknown-pragmas -Wno-uninitialized -Wno-maybe-uninitialized -Wno-attributes "
    "-Wno-unknown-warning-option"
).split()
NVCC_FLAGS = f"{COMMON} -DUSE_CUDA -lineinfo -Xcompiler=-fvisibility=hidden".split()
NVCC_FLAGS += ["-Xfatbin=-compress-all", "--threads=2"]


def import_torch() -> Any:
    need = 'pip install "torch>={}.{}"'.format(*OLDEST_TORCH)
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"elf_fast: the build needs torch ({error}): {need} setuptools ninja pybind11 first, "
            "or drop --no-build-isolation"
        ) from None
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"elf_fast: torch {torch.__version__} is too old: {need}")
    return torch


def find_compiler() -> str:
    """$CXX, which may hold a launcher and options, or else the first usual name on PATH."""
    chosen = os.environ.get("CXX", "").strip()
    names = [chosen] if chosen else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name.split()[0]):
            return name
    raise SystemExit(
        f"elf_fast: no C++ compiler found (looked for {', '.join(names)}): install GCC or Clang, "
        "name it in CXX, or set ELF_FAST_BUILD=none to install without native code"
    )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def ask(pattern: str, *command: str) -> str:
    """The group of `pattern` in what the command prints; empty if the pattern does not match or the
    command cannot be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError:
        return ""
    found = re.search(pattern, done.stdout)
    return found[1].strip() if found else ""


def cuda_problem(torch: Any, sources: list[str]) -> str | None:
    """Why the CUDA library cannot be built, and what to do about it; None if it can."""
    wanted = torch.version.cuda
    if wanted is None:
        return f"torch {torch.__version__} has no CUDA: install a CUDA build of torch"
    toolkit, nvcc = f"CUDA {wanted.split('.')[0]} toolkit", find_nvcc()
    if nvcc is None:
        return f"no nvcc in CUDA_HOME or on PATH: install the {toolkit} or set CUDA_HOME"
    release = ask(r"release (\d+\.\d+)", nvcc, "--version")
    if release.split(".")[0] != wanted.split(".")[0]:
        return (
            f"{nvcc} is CUDA {release or 'of no known release'} and torch {torch.__version__} was "
            f"built with CUDA {wanted}: set CUDA_HOME to a {toolkit}, or install a torch that fits"
        )
    return None if sources else "this source tree has no CUDA kernels: use ELF_FAST_BUILD=cpu"


def toolkit_home(nvcc: str) -> str:
    """The folder of the toolkit, as nvcc reports it: the nvcc on PATH may be a wrapper script that
    lies elsewhere."""
    top = ask(r"(?m)^#\$ TOP=(.+)$", nvcc, "--dryrun", "-x", "cu", os.devnull)
    return os.path.realpath(top if os.path.exists(f"{top}/bin/nvcc") else f"{nvcc}/../..")


def jobs() -> int:
    """Compilers to run at once: one per core and per 2 GB of memory."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1]
    for path, pattern in (("/proc/meminfo", r"MemAvailable:\s*(\d+)"), (CGROUP, r"(\d+)\d{3}")):
        if os.path.exists(path) and (kilobytes := re.search(pattern, Path(path).read_text())):
            limits.append(int(kilobytes[1]) // 2_000_000)
    return max(1, min(limits))


def prefix_maps(torch: Any) -> list[str]:
    """Options that write paths of sources and of torch's headers, which messages of checks name, as
    if both lay in one folder. CPU libraries built from the same sources in two folders are then
    equal. CUDA libraries are not, and no option of nvcc 13.0 helps: it names internal symbols,
    those of NVIDIA's own headers too, after a hash of the folder and its process number."""
    folders = {os.path.abspath("."): ".", os.path.dirname(torch.__file__): "torch"}
    return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]


def native(mode: str) -> dict[str, Any]:
    """The arguments of `setup` that compile what `mode` asks for."""
    torch = import_torch()
    cpu, cuda = (sorted(map(str, Path("csrc").glob(p))) for p in ("cpu/*.cpp", "cuda/*.cu"))
    problem = "not asked for" if mode == "cpu" else cuda_problem(torch, cuda)
    if problem and mode == "cuda":
        raise SystemExit(f"elf_fast: ELF_FAST_BUILD=cuda: {problem}")
    if problem and mode == "auto":
        print(f"elf_fast: building the CPU library only; {problem}")
    elif not problem:
        os.environ["CUDA_HOME"] = toolkit_home(find_nvcc())
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    os.environ.setdefault("MAX_JOBS", str(jobs()))
    # The ninja of a virtual environment is not on PATH unless the environment is activated.
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:{sysconfig.get_path('scripts')}"
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def run(self) -> None:
            os.environ["CXX"] = find_compiler()
            try:
                super().run()
            except RuntimeError as error:
                raise SystemExit(f"elf_fast: {error} (the compiler says why above)") from None

    maps = prefix_maps(torch)
    flags = {
        "cxx": CXX_FLAGS + maps,
        "nvcc": NVCC_FLAGS + [f"-Xcompiler={option}" for option in maps],
    }
    args = {"extra_compile_args": flags, "py_limited_api": True}
    libraries = [CppExtension("elf_fast._native_cpu", cpu, **args)]
    if not problem:
        libraries.append(CUDAExtension("elf_fast._native_cuda", cuda, **args))
    command = Build.with_options(no_python_abi_suffix=True)
    return {"ext_modules": libraries, "cmdclass": {"build_ext": command}}


if __name__ == "__main__":
    build = os.environ.get("ELF_FAST_BUILD") or "auto"
    if build not in MODES:
        raise SystemExit(f"elf_fast: ELF_FAST_BUILD: expected {', '.join(MODES)}, got {build!r}")
    # The time of the files in a wheel. Archives of the sources keep that of this file.
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(int(os.stat(__file__).st_mtime)))
    setup(
        packages=[*find_packages(include=["elf_fast", "elf_fast.*"]), "elf_fast.kernels"],
        package_dir={"elf_fast.kernels": "kernels"},
        **(native(build) if build != "none" else {}),
    )

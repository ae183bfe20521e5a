"""Checks the package on a GPU in one command: build, tests, compute-sanitizer and targets.

    make gpu-check OUT=dir [PARTS="build test sanitizer benchmarks"]

It needs nvcc and a Python with torch, Triton, pip, setuptools and pytest, but no network. The
package is built for the architecture of the GPU and installed into build/gpu-check, so that the
Python stays as it is; later calls of single parts use that installation. If a part fails or runs
out of time, the next ones still run. OUT receives log.txt with everything printed, check.json with
the outcome of the parts, rewritten after each, and kernels.json with the measurements. The exit
status is 1 if a part failed. --dry-run goes through short forms of all parts on a machine without a
GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..environment import ask

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "gpu-check"

#: Seconds for all parts, and the seconds reserved for each part while earlier ones run.
TOTAL = 520.0
RESERVED = {"build": 120.0, "test": 180.0, "sanitizer": 90.0, "benchmarks": 120.0}
#: Seconds that a part out of time has to end by itself before it is killed.
GRACE = 10.0
#: Exit status of a part that cannot run on this machine; its last line says why.
SKIPPED = 77

#: The tests of what behaves differently on a GPU, the most important first, and a package that each
#: needs.
TESTS = {
    "test_cuda.py": None,
    "test_ops.py": None,
    "test_dispatch.py": None,
    "test_modules.py": "hypothesis",
    "test_losses.py": None,
    "test_backend.py": None,
    "test_bad_input.py": None,
    "test_layers.py": None,
}
#: Tests in these files that say nothing about a GPU, or that fail when other tests take the CPUs.
LEFT_OUT = ("narrower_instruction_sets", "import_is_quick")


@dataclass(frozen=True)
class Part:
    name: str
    command: Sequence[str]
    reserved: float  # seconds
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path = ROOT


@dataclass
class Result:
    part: str
    outcome: str  # "ok", "failed", "out of time" or "skipped"
    seconds: float
    key_numbers: str  # the last line that the part printed
    failures: list[str]  # the lines that begin with FAILED or ERROR


def run_part(part: Part, limit: float, log: Path) -> Result:
    """Runs a part for at most `limit` seconds and appends its output to `log` as it comes."""
    start = time.monotonic()
    with log.open("ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            part.command, cwd=part.cwd, env=os.environ | part.env, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    status = _wait(process, limit)
    seconds = time.monotonic() - start
    lines = log.read_bytes()[begin:].decode(errors="replace").split("\n")
    named = {None: "out of time", 0: "ok", SKIPPED: "skipped"}
    return Result(
        part.name,
        named.get(status, "failed"),
        round(seconds, 1),
        next((line.strip(" =") for line in reversed(lines) if line.strip(" =")), ""),
        [line for line in lines if re.match(r"(FAILED|ERROR) ", line)],
    )


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit status, or None if the time was up. Ends every process of its group."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints what failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check(parts: Sequence[Part], out: Path, about: dict[str, str], total: float = TOTAL) -> int:
    """Runs the parts in turn and prints their outcomes. Later parts may use the time that an
    earlier one leaves.

    Returns: 0, or 1 if a part failed or ran out of time.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")

    def say(text: str) -> None:
        print(text, flush=True)
        with log.open("a") as file:
            file.write(f"{text}\n")

    say(", ".join(f"{name} {value}" for name, value in about.items()))
    end = time.monotonic() + total
    results: list[Result] = []
    for i, part in enumerate(parts):
        limit = end - time.monotonic() - sum(later.reserved for later in parts[i + 1 :])
        say(f"\n{part.name}: at most {limit:.0f} s: {shlex.join(part.command)}")
        result = run_part(part, limit, log)
        results.append(result)
        say(f"{part.name}: {result.outcome}, {result.seconds:.1f} s: {result.key_numbers}")
        for failure in result.failures[:40]:
            say(f"  {failure[:200]}")
        if (more := len(result.failures) - 40) > 0:
            say(f"  and {more} more, see {log}")
        summary = {"about": about, "parts": [asdict(r) for r in results]}
        (out / "check.json").write_text(json.dumps(summary, indent=1) + "\n")
    kernels = out / "kernels.json"
    if any(part.name == "benchmarks" for part in parts) and kernels.exists():
        say("\nthe ten rows that are furthest below their targets, or closest to them")
        say(_closest(kernels))
    say(f"\n{'part':12}{'result':14}{'seconds':>8}  key numbers")
    for r in results:
        say(f"{r.part:12}{r.outcome:14}{r.seconds:8.1f}  {r.key_numbers[:120]}")
    return int(any(r.outcome not in ("ok", "skipped") for r in results))


def _on_installed(name: str, module: str, *arguments: str) -> Part:
    """A part that runs a module of benchmarks/ on the installed package.

    `python -m` puts the current folder first on the module path. So the current folder is the
    installation, and benchmarks/ comes through PYTHONPATH: run from the root of the repository, the
    module would import the elf_fast there, which has no libraries.
    """
    path = f"{LIBRARY}{os.pathsep}{ROOT}"
    env = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    return Part(name, [sys.executable, "-m", module, *arguments], RESERVED[name], env, LIBRARY)


def _closest(kernels: Path) -> str:
    """The table of the ten rows that are furthest below their targets, or closest to them."""
    show = ("--show", str(kernels), "--closest", "10")
    part = _on_installed("benchmarks", "benchmarks.gpu.targets", *show)
    try:
        done = subprocess.run(
            part.command, cwd=part.cwd, env=os.environ | part.env, timeout=30, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not printed in time; {kernels} has them"
    return done.stdout.rstrip()


def _missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _tests() -> list[str]:
    """The arguments of pytest. Prints which files are left out."""
    files = []
    for name, package in TESTS.items():
        if package and _missing(package):
            print(f"{name} is left out: it needs the package {package}")
        else:
            files.append(str(ROOT / "tests" / name))
    # Most of the time is Triton's compiler, which runs in the process that calls the kernel.
    processes = min(8, os.cpu_count() or 1)
    spread = [] if _missing("xdist") else ["-n", str(processes)]
    return [*spread, "--maxfail=60", "-k", f"not ({' or '.join(LEFT_OUT)})", *files]


def parts_of(out: Path, architecture: str | None) -> dict[str, Part]:
    """The parts by name.

    Args:
        architecture: compute capability of the GPU, as "9.0"; None for the dry run.
    """
    dry = architecture is None
    python = sys.executable
    install = shlex.join(
        [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--upgrade",
         "--disable-pip-version-check", "--no-cache-dir", "--target", str(LIBRARY), "."]
    )  # fmt: skip
    if dry:
        build = f"ELF_FAST_BUILD=none {install}"
        tests = [str(ROOT / "tests/test_ops.py"), "-k", "test_compact_of_views and triton"]
    else:
        # Without a CUDA library the other parts still check the Triton kernels.
        build = f"ELF_FAST_BUILD=cuda {install} || (ELF_FAST_BUILD=cpu {install}; exit 1)"
        tests = _tests()
    pytest = [python, "-m", "pytest", "-v", "--tb=short", "-rfEs", "-p", "no:cacheprovider",
              "-o", "faulthandler_timeout=60"]  # fmt: skip
    env = {"PYTHONPATH": str(LIBRARY), "PYTHONUNBUFFERED": "1"}
    measure = ["--output", str(out / "kernels.json")]
    if dry:
        measure += ["--dry-run", "--quick", "--budget", "5"]
    made = [
        Part("build", ["sh", "-c", build], RESERVED["build"],
             {"TORCH_CUDA_ARCH_LIST": architecture or ""}),
        # From another folder, so that the tests import the installed package.
        Part("test", [*pytest, *tests], RESERVED["test"], env, LIBRARY),
        _on_installed("sanitizer", "benchmarks.gpu.sanitizer", *(["--calls"] if dry else [])),
        _on_installed("benchmarks", "benchmarks.gpu.targets", *measure),
    ]  # fmt: skip
    return {part.name: part for part in made}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the log and the results"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=RESERVED,
        default=list(RESERVED),
        help="the parts to run",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="short forms of the parts, no GPU needed"
    )
    options = parser.parse_args()
    out = options.out.resolve()
    gpu = ask("nvidia-smi", "--query-gpu=compute_cap,name,driver_version", "--format=csv,noheader")
    if not gpu and not options.dry_run:
        parser.error("nvidia-smi finds no GPU; --dry-run needs none")
    needs = {"build": ("pip", "setuptools"), "test": ("pytest",)}
    missing = [p for part in options.parts for p in needs.get(part, ()) if _missing(p)]
    if missing:
        parser.error(f"{sys.executable} lacks the packages {', '.join(missing)}")
    if "build" in options.parts:
        shutil.rmtree(LIBRARY, ignore_errors=True)
        LIBRARY.mkdir(parents=True)
    elif not (LIBRARY / "elf_fast").exists():
        parser.error(f"nothing is installed in {LIBRARY}: run the part build first")
    first = gpu.split("\n")[0].split(", ")
    about: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": ask("git", "rev-parse", "HEAD") or "unknown",
        "gpu": "none: dry run" if options.dry_run else ", ".join(first[1:]),
        "python": sys.version.split()[0],
    }
    parts = parts_of(out, None if options.dry_run else first[0])
    return check([parts[name] for name in RESERVED if name in options.parts], out, about)


if __name__ == "__main__":
    sys.exit(main())

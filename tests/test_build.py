"""The package as users get it: built from the sdist alone, installed, run; errors of the build."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import emulated_cuda
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "elf_fast/__init__.py").read_text())[1]
FOLDERS = ("elf_fast", "kernels", "csrc", "tests", "benchmarks", "docs")
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".*cache", ".venv", "__pycache__", "*.so", "*.egg-info", "build", "dist"
)

#: The oldest torch that pyproject.toml asks for.
OLDEST_TORCH = "2.11.0"

#: Gates two rows, of which the second is unsure, and prints the kernels that ran.
PROBE = """
import json, torch, elf_fast, elf_fast.kernels
gate = elf_fast.functional.exit_gate(torch.tensor([[9.0, 0.0], [1.0, 1.0]]), 0.9)
print(json.dumps({
    "torch": torch.__version__,
    "package": elf_fast.__file__,
    "kernels": elf_fast.kernels.__file__,
    "cpu": elf_fast.report()["cpu"],
    "survivors": gate.survivors.tolist(),
    "prediction": gate.prediction.tolist(),
}))
"""


def environment(**changes: str) -> dict[str, str]:
    settings = ("ELF_FAST_", "PYTHONPATH", "CUDA_HOME", "CUDA_PATH")
    return {k: v for k, v in os.environ.items() if not k.startswith(settings)} | changes


def run(*command: str | Path, cwd: Path, check: bool = True, **changes: str):
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def pip(*arguments: str | Path, cwd: Path, check: bool = True, **changes: str):
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    return run(*command, cwd=cwd, check=check, **changes)


def build_wheel(source: Path, out: Path, mode: str) -> Path:
    flags = ("--no-build-isolation", "--no-deps", "-w", out)
    # One architecture is enough to see that the CUDA library gets there.
    pip("wheel", *flags, source, cwd=out.parent, ELF_FAST_BUILD=mode, TORCH_CUDA_ARCH_LIST="9.0")
    (wheel,) = out.glob("*.whl")
    return wheel


def probe(cwd: Path, *folders: Path) -> dict:
    path = os.pathsep.join(str(f) for f in folders)
    done = run(sys.executable, "-c", PROBE, cwd=cwd, PYTHONPATH=path)
    return json.loads(done.stdout.splitlines()[-1])


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def native_libraries(wheel: Path) -> list[str]:
    return sorted(n for n in names(wheel) if n.endswith((".so", ".pyd", ".dylib")))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, so that building leaves no traces in them."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "tree", ignore=NOT_SOURCE))


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    out = tree.parent / "sdist"
    build = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check")
    run(*build, "-o", out, tree, cwd=tree, ELF_FAST_BUILD="none")
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("auto") / "wheel", "auto")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed") / "packages"
    pip("install", "-q", "--no-deps", "--target", target, wheel, cwd=target.parent)
    return target


@pytest.fixture(scope="module")
def oldest_torch(tmp_path_factory) -> Path:
    """Only torch itself. Its dependencies come from the environment that runs the tests."""
    target = tmp_path_factory.mktemp("torch") / "packages"
    flags = ("-q", "--no-deps", "--only-binary", ":all:", "--target", target)
    got = pip("install", *flags, f"torch=={OLDEST_TORCH}", cwd=target.parent, check=False)
    if got.returncode:
        pytest.skip(f"pip cannot get torch {OLDEST_TORCH}: {got.stdout.splitlines()[-1]}")
    return target


def test_a_source_tree_uses_its_own_kernels_and_libraries(tree, tmp_path):
    """Two trees side by side, while the tree under test is installed, too."""
    second = Path(shutil.copytree(tree, tmp_path / "second"))
    (second / "elf_fast" / "_native_cpu.so").write_bytes(b"not a library")
    for first, other in ((tree, second), (second, tree)):
        found = probe(tmp_path, first, other)
        assert Path(found["package"]) == first / "elf_fast" / "__init__.py"
        assert Path(found["kernels"]) == first / "kernels" / "__init__.py"
        refused = "_native_cpu.so does not load" in found["cpu"]
        assert refused == (first == second), found["cpu"]


def test_sdist_holds_the_sources(tree, sdist):
    with tarfile.open(sdist) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    files = (f for folder in FOLDERS for f in (tree / folder).rglob("*") if f.is_file())
    expected = {f.relative_to(tree).as_posix() for f in files}
    expected |= {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"}
    assert expected - held == set()
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package(wheel, recipe):
    held = names(wheel)
    assert {"elf_fast/__init__.py", "elf_fast/py.typed", "elf_fast/kernels/__init__.py"} <= held
    fits = recipe.cuda_problem(torch, ["gate.cu"]) is None
    built = ["elf_fast/_native_cpu.so", *["elf_fast/_native_cuda.so"] * fits]
    assert native_libraries(wheel) == built
    info = f"elf_fast-{VERSION}.dist-info"
    assert {name.partition("/")[0] for name in held} == {"elf_fast", info}
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "elf-fast = elf_fast.cli:main" in scripts


def test_the_cpu_library_does_not_name_the_folder_of_its_build(wheel):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read("elf_fast/_native_cpu.so")
    named = set(re.findall(rb"[ -~]*\.(?:cpp|h|inl)(?=\0)", library))
    assert b"./csrc/cpu/compact.cpp" in named
    assert [name for name in named if name.startswith(b"/")] == []


def test_wheel_runs(installed, tmp_path):
    said = probe(tmp_path, installed)
    assert Path(said["package"]).is_relative_to(installed)
    assert Path(said["kernels"]).is_relative_to(installed)
    assert said["cpu"] == "cpu (C++)"
    assert said["survivors"] == [1] and said["prediction"] == [0, 0]


def test_wheel_runs_on_the_oldest_torch(installed, oldest_torch, tmp_path):
    works = (sys.executable, "-c", "import torch")
    tried = run(*works, cwd=tmp_path, check=False, PYTHONPATH=str(oldest_torch))
    if tried.returncode:
        pytest.skip(f"torch {OLDEST_TORCH} does not run here: {tried.stdout.splitlines()[-1]}")
    said = probe(tmp_path, installed, oldest_torch)
    assert said["torch"].startswith(OLDEST_TORCH)
    assert said["cpu"] == "cpu (C++)"
    assert said["survivors"] == [1] and said["prediction"] == [0, 0]


def test_sources_compile_with_the_oldest_torch(recipe, oldest_torch, tree):
    """The headers of a later torch hold more; TORCH_TARGET_VERSION does not hide all of it."""
    headers = f"-isystem{oldest_torch}/torch/include"
    stand_in = [*emulated_cuda.FLAGS, f"-I{ROOT}/tests/cuda_on_cpu"]
    sources = {s: recipe.CXX_FLAGS for s in sorted((tree / "csrc/cpu").glob("*.cpp"))}
    sources |= {s: stand_in for s in sorted((tree / "csrc/cuda").glob("*.cu"))}
    assert len(sources) > 5
    compiler = recipe.find_compiler().split()
    for source, flags in sources.items():
        run(*compiler, "-fsyntax-only", *flags, headers, source, cwd=tree)


def test_none_compiles_nothing(sdist, tmp_path):
    wheel = build_wheel(sdist, tmp_path / "wheel", "none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert native_libraries(wheel) == []
    pip("install", "-q", "--no-deps", "--target", tmp_path / "at", wheel, cwd=tmp_path)
    said = probe(tmp_path, tmp_path / "at")
    assert said["cpu"].startswith("torch (plain PyTorch) (cpu: elf_fast was built without its CPU")
    assert said["survivors"] == [1] and said["prediction"] == [0, 0]


def test_editable_install_finds_the_kernels(tree, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    own = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path)
    outer = [path for path in sys.path if path.endswith("-packages")]
    (Path(own.stdout.strip()) / "outer.pth").write_text("\n".join(outer))
    flags = ("-q", "--no-deps", "--no-build-isolation")
    pip("--python", python, "install", *flags, "-e", tree, cwd=tmp_path, ELF_FAST_BUILD="none")
    said = json.loads(run(python, "-c", PROBE, cwd=tmp_path).stdout.splitlines()[-1])
    assert Path(said["package"]).is_relative_to(tree)
    assert Path(said["kernels"]) == tree / "kernels/__init__.py"


def refusal(done: subprocess.CompletedProcess) -> str:
    """The one line that says why a build stopped."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    (line,) = (x for x in done.stdout.splitlines() if "elf_fast: " in x)
    return line


def test_unknown_mode_is_refused(tree):
    setup = (sys.executable, "setup.py", "--version")
    line = refusal(run(*setup, cwd=tree, check=False, ELF_FAST_BUILD="gpu"))
    assert line == "elf_fast: ELF_FAST_BUILD: expected auto, cuda, cpu, none, got 'gpu'"


def test_missing_compiler_is_refused(tree, tmp_path):
    nothing = {"CXX": str(tmp_path / "no-such-compiler"), "PATH": str(tmp_path)}
    command = (sys.executable, "setup.py", "-q", "build_ext")
    line = refusal(run(*command, cwd=tree, check=False, ELF_FAST_BUILD="cpu", **nothing))
    assert "no C++ compiler found" in line and nothing["CXX"] in line
    assert "install GCC or Clang" in line


def test_missing_torch_is_refused(tree, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")")
    flags = ("--no-build-isolation", "--no-deps", "-w", tmp_path)
    done = pip("wheel", *flags, tree, cwd=tmp_path, check=False, PYTHONPATH=str(tmp_path))
    line = refusal(done)
    assert 'pip install "torch>=2.11" setuptools ninja pybind11 first' in line
    assert "drop --no-build-isolation" in line


def test_old_torch_is_refused(tree, tmp_path):
    (tmp_path / "torch.py").write_text('__version__ = "2.10.1+cpu"')
    setup = (sys.executable, "setup.py", "--version")
    line = refusal(run(*setup, cwd=tree, check=False, PYTHONPATH=str(tmp_path)))
    assert line == 'elf_fast: torch 2.10.1+cpu is too old: pip install "torch>=2.11"'


def fake_nvcc(folder: Path, release: str) -> Path:
    """A script that answers as nvcc does, for a toolkit in `folder`."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'echo "Cuda compilation tools, release {release}, V{release}.0"\n'
        f'echo "#\\$ TOP={folder}/bin/.."\n'
    )
    nvcc.chmod(0o755)
    return nvcc


def fake_torch(cuda: str | None) -> SimpleNamespace:
    return SimpleNamespace(__version__="2.14.1", version=SimpleNamespace(cuda=cuda))


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_cuda_needs_a_cuda_torch(recipe, no_nvcc):
    problem = recipe.cuda_problem(fake_torch(None), ["gate.cu"])
    assert problem == "torch 2.14.1 has no CUDA: install a CUDA build of torch"


def test_cuda_needs_nvcc(recipe, no_nvcc):
    problem = recipe.cuda_problem(fake_torch("13.0"), ["gate.cu"])
    assert (
        problem == "no nvcc in CUDA_HOME or on PATH: install the CUDA 13 toolkit or set CUDA_HOME"
    )


@pytest.mark.parametrize("variable", ["PATH", "CUDA_HOME"])
def test_cuda_versions_must_agree(recipe, no_nvcc, monkeypatch, tmp_path, variable):
    nvcc = fake_nvcc(tmp_path, "12.1")
    monkeypatch.setenv(variable, str(nvcc.parent if variable == "PATH" else tmp_path))
    problem = recipe.cuda_problem(fake_torch("13.0"), ["gate.cu"])
    assert "is CUDA 12.1 and torch 2.14.1 was built with CUDA 13.0" in problem
    assert "set CUDA_HOME to a CUDA 13 toolkit" in problem
    assert recipe.cuda_problem(fake_torch("12.9"), ["gate.cu"]) is None


@pytest.mark.parametrize("content", ["", "\x7fELF of another machine"])
def test_an_nvcc_that_does_not_start_is_none_that_fits(
    recipe, no_nvcc, monkeypatch, tmp_path, content
):
    nvcc = fake_nvcc(tmp_path, "13.0")
    nvcc.write_text(content)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    problem = recipe.cuda_problem(fake_torch("13.0"), ["gate.cu"])
    assert problem.startswith(f"{nvcc} is CUDA of no known release")


def test_an_empty_name_of_a_compiler_is_none(recipe, monkeypatch):
    monkeypatch.setenv("CXX", " ")
    assert recipe.find_compiler() in ("c++", "g++", "clang++")


def test_cuda_needs_kernels(recipe, no_nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, "13.0").parents[1]))
    problem = recipe.cuda_problem(fake_torch("13.0"), [])
    assert problem == "this source tree has no CUDA kernels: use ELF_FAST_BUILD=cpu"


def test_toolkit_behind_a_wrapper(recipe, tmp_path):
    nvcc = fake_nvcc(tmp_path / "toolkit", "13.0")
    wrapper = tmp_path / "usr" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    assert recipe.toolkit_home(str(wrapper)) == str((tmp_path / "toolkit").resolve())


#: Runs setup.py on a torch that says it was built with CUDA 13.0.
ON_CUDA_TORCH = (
    "import runpy, sys, torch; torch.version.cuda = '13.0'; sys.argv = ['setup.py', '--version']; "
    "runpy.run_path('setup.py', run_name='__main__')"
)


def test_requested_cuda_is_refused_and_auto_goes_on(tree, tmp_path):
    folder = fake_nvcc(tmp_path, "12.1").parent
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    command = (sys.executable, "-c", ON_CUDA_TORCH)
    line = refusal(run(*command, cwd=tree, check=False, ELF_FAST_BUILD="cuda", PATH=path))
    assert line.startswith("elf_fast: ELF_FAST_BUILD=cuda: ") and "CUDA 12.1" in line
    said = run(*command, cwd=tree, PATH=path).stdout
    assert said.count("elf_fast: building the CPU library only; ") == 1
    assert said.splitlines()[-1] == VERSION


def test_jobs_are_bounded(recipe):
    assert 1 <= recipe.jobs() <= (os.cpu_count() or 1)


#: Calls the operators of one source, built with the sanitizer, on batches without rows or bytes.
EMPTY = """
import sys, torch
from elf_fast import ops
torch.ops.load_library(sys.argv[1])
for shape in ((3, 0), (0, 4), (0, 0), (2, 0, 5)):
    for n in {0, shape[0]}:
        x, kept = torch.empty(shape), torch.arange(n)
        y = torch.ops.elf_fast.compact(x, kept)
        torch.ops.elf_fast.compact_backward(y, kept, shape[0])
        torch.ops.elf_fast.compact_(x.clone(), kept, None)
"""


def test_batches_without_bytes_are_no_undefined_behaviour(recipe, tmp_path):
    folder, library = Path(torch.__file__).parent, tmp_path / "compact.so"
    flags = [*recipe.CXX_FLAGS, "-O0", "-fPIC", "-shared", "-fsanitize=undefined"]
    paths = (f"-isystem{folder}/include", f"-L{folder}/lib")
    source = ROOT / "csrc/cpu/compact.cpp"
    compiler = recipe.find_compiler().split()
    run(*compiler, *flags, *paths, source, "-o", library, "-ltorch_cpu", cwd=tmp_path)
    python = {"ELF_FAST_BACKEND": "torch", "PYTHONPATH": str(ROOT)}
    said = run(sys.executable, "-c", EMPTY, library, cwd=tmp_path, **python).stdout
    assert "runtime error" not in said, said

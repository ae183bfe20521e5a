# The targets set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' -o -name '*.inl')
PACKAGES := elf_fast kernels
FORMATTED := $(PACKAGES) benchmarks docs/*.py tests setup.py

.PHONY: demo test bench bench-full gpu-check docs lint format clean

demo: .venv/native
	$(BIN)/elf-fast demo

test: .venv/native
	$(BIN)/python -m pytest -q tests

bench: .venv/native
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-disable-gc \
	  --benchmark-max-time=0.3 --benchmark-min-rounds=5 --benchmark-group-by=group \
	  --benchmark-sort=name --benchmark-columns=median,iqr,min,rounds
	$(BIN)/python -W ignore -m benchmarks.cpu.targets

# RESULTS=benchmarks/results/NAME.json keeps the rows; docs/performance.md is written from them.
bench-full: .venv/native
	$(BIN)/python -W ignore -m benchmarks.cpu.targets --full $(if $(RESULTS),--output $(RESULTS))
	$(BIN)/python -m benchmarks.pages.performance

# Uses $(PYTHON) as it is, on a machine with a GPU, nvcc and torch.
PARTS ?= build test sanitizer benchmarks
gpu-check:
	$(PYTHON) -m benchmarks.gpu.check --out $(or $(OUT),$(error OUT: name a folder for the results)) \
	  --parts $(PARTS)

# Links, anchors and names that do not resolve are errors. The variable switches off an advertisement.
docs: .venv/docs
	PATH=$(CURDIR)/$(BIN):$$PATH NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "To read: $(BIN)/python -m http.server -d build/site, then http://localhost:8000"

lint: .venv/deps
	$(BIN)/ruff check $(FORMATTED)
	$(BIN)/ruff format --check $(FORMATTED)
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/python -m pytest -q tests/test_layers.py

format: .venv/deps
	$(BIN)/ruff check --fix $(FORMATTED)
	$(BIN)/ruff format $(FORMATTED)
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf .venv/native build dist *.egg-info elf_fast/_native_*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find elf_fast kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# The editable install compiles nothing, so that linting waits for no compiler and a change in
# csrc/ recompiles only what it touches.
.venv/deps: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) setuptools ninja pybind11
	ELF_FAST_BUILD=none $(PIP) --no-build-isolation -e ".[train,bench,serve,dev]"
	touch $@

.venv/docs: .venv/deps
	ELF_FAST_BUILD=none $(PIP) --no-build-isolation -e ".[docs]"
	touch $@

.venv/native: .venv/deps setup.py $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

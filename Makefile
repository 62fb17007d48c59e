# Needs python3, pip, g++ and make; nvcc if CUDA kernels are wanted. Stamp files in .make keep the second run fast.
PYTHON ?= python3
TORCH := torch==2.14.1 torchvision==0.29.1
# Asks for a requests of 2021, which it never imports.
NO_DEPS := torchattacks==3.5.1
BIN := .venv/bin
export MAX_JOBS ?= 2

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test lint docs wheel bench gpu sanitize clean
.DELETE_ON_ERROR:

demo: .make/build
	$(BIN)/engm demo $(ARGS)

# One thread a worker: two workers with two threads each would only get in each other's way.
test: .make/build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

lint: .make/venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors: a broken link, a reference to a name that is not documented, a parameter that does not exist.
docs: .make/venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# dist/ with a source distribution and the wheel built from it, looked through and tried in an environment of its own.
wheel: .make/build
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/check-wheel-contents dist/*.whl
	ENGM_DIST=dist $(BIN)/python -m pytest -q tests/ecosystem/test_distribution.py

bench: .make/build
	$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-group-by=group

# On a machine with a GPU. Where a torch of its own is installed and engm built with it: make sanitize GPU_PYTHON=python3
gpu: .make/build
	$(BIN)/python -m pytest -q -m gpu tests

GPU_PYTHON ?= $(BIN)/python
SANITIZE ?=
sanitize:
	$(GPU_PYTHON) tests/gpu/sanitize.py $(SANITIZE)

.make/venv: requirements-dev.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH) -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps $(NO_DEPS)
	@mkdir -p .make && touch $@

.make/build: .make/venv $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@mkdir -p .make && touch $@

# Leaves .venv, which takes longest to make: remove it by hand.
clean:
	rm -rf build dist .make *.egg-info engm/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find engm tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

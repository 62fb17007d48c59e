# Needs python3, pip, g++ and make; nvcc if CUDA kernels are wanted. Stamp files in .make keep the second run fast.
PYTHON ?= python3
TORCH := torch==2.14.1 torchvision==0.29.1
# The oldest torch that pyproject.toml promises, on any Python that it promises.
OLDEST_PYTHON ?= python3
OLDEST_TORCH := torch==2.11.0
OLDEST := $(CURDIR)/.venv-oldest/bin/python
# Asks for a requests of 2021, which it never imports.
NO_DEPS := torchattacks==3.5.1
BIN := .venv/bin
export MAX_JOBS ?= 2
# Hundreds of processes read the same modules, and pytest takes ten seconds to rewrite those of the tests.
unexport PYTHONDONTWRITEBYTECODE

EMULATOR := $(wildcard tests/emulator/*.cpp tests/emulator/*.h) tests/emulator/build.py
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test test-all test-oldest lint docs wheel bench gpu sanitize clean
.DELETE_ON_ERROR:

demo: .make/build
	$(BIN)/engm demo $(ARGS)

# Two workers with one thread each: with two threads each they would only get in each other's way. A worker takes a run
# of neighbouring tests, so that few fixtures are made twice, and steals from the other when it has no more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# Everything that takes less than ten seconds a test: ten to twenty minutes on two cores, and a minute more where the
# emulator has to be compiled first. A test of more than 60 seconds of processor time, which is 30 on a machine that is
# quick, fails here unless it is marked as slow.
test: .make/build .make/emulator
	$(PYTEST) -m "not slow" --most-seconds 60 tests

# The rest: what 'make test' leaves out, and nothing else. Both together run every test once.
test-all: .make/build .make/emulator
	$(PYTEST) -m slow tests

# What depends on torch's insides, on the oldest torch. The tests run from a copy of their folder: beside the checkout's
# engm they would import that one, whose compiled module is of the other torch.
test-oldest: .make/oldest-build
	rm -rf build/oldest/tree && mkdir -p build/oldest/tree && cp -r tests pyproject.toml build/oldest/tree
	cd build/oldest/tree && $(OLDEST) -c "import engm, torch; print('testing', engm.__file__, 'on torch', torch.__version__)"
	cd build/oldest/tree && OMP_NUM_THREADS=1 $(OLDEST) -m pytest -q -n 2 --dist worksteal -m "torch_insides and not gpu" \
		$$(grep -rl --include='test_*.py' 'mark\.torch_insides' tests)

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

# The CUDA kernels compiled for the CPU, which the tests in tests/emulator run.
.make/emulator: .make/build $(EMULATOR)
	PYTHONPATH=tests $(BIN)/python -m emulator.build
	@mkdir -p .make && touch $@

.make/oldest-venv: requirements-oldest.txt Makefile
	test -x $(OLDEST) || $(OLDEST_PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet $(OLDEST_TORCH) -r requirements-oldest.txt
	@mkdir -p .make && touch $@

# A wheel, all of whose parts are built outside of the package's folder: an editable install would write its engm/_C over
# that of the other torch, which has the same name. Without --skip-build everything would be compiled twice.
.make/oldest-build: .make/oldest-venv $(SOURCES) $(shell find engm -name '*.py')
	rm -rf build/oldest/lib* build/oldest/dist && mkdir -p build/oldest
	PATH="$(dir $(OLDEST)):$$PATH" ENGM_CPU_ONLY=1 $(OLDEST) setup.py --quiet egg_info --egg-base build/oldest \
		build --build-base build/oldest \
		bdist_wheel --skip-build --bdist-dir build/oldest/wheel --dist-dir build/oldest/dist
	$(OLDEST) -m pip install --quiet --no-deps --force-reinstall build/oldest/dist/*.whl
	@mkdir -p .make && touch $@

# Leaves .venv and .venv-oldest, which take longest to make: remove them by hand.
clean:
	rm -rf build dist .make *.egg-info engm/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find engm tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

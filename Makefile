# One environment, .venv, made from constraints.txt on first use and again when that, pyproject.toml or a kernel changes.
PYTHON ?= python3
BIN := .venv/bin
TEST_PROCESSES ?= 2

.PHONY: setup demo check kernels-check test nightly bench zoo docs
.DEFAULT_GOAL := setup

setup: .venv/stamp

.venv/stamp: pyproject.toml constraints.txt $(wildcard src/secateur/runtime/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Secateur needs Python 3.11 or newer, found: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## train, prune, recover, export and report a small network
	$(BIN)/secateur demo

check: setup  ## what CI runs first
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

kernels-check:  ## what CI runs second: the engine of every instruction set against plain loops, sanitized
	cmake -S src/secateur/runtime/csrc -B build/check -DSECATEUR_CHECKS=ON -DSECATEUR_SANITIZE=ON
	cmake --build build/check --parallel $(TEST_PROCESSES)
	build/check/check 10000

test: setup  ## what CI runs third
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES)

nightly: setup  ## the law over 2,000 random networks, compat.prune over 6,000 random sequences of calls
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) -m nightly

bench: setup  ## hours; picks up where it stopped
	$(BIN)/python benchmarks/first_road.py
	$(BIN)/python benchmarks/analyze_cost.py
	$(BIN)/python benchmarks/cost_global.py
	$(BIN)/python benchmarks/compat_memory.py
	$(BIN)/python benchmarks/real_nets.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/sparse_kernels.py
	$(BIN)/python benchmarks/sparse_models.py
	$(BIN)/python benchmarks/packed_files.py
	$(BIN)/python benchmarks/tables.py

zoo: setup  ## an hour: every timm family, Hugging Face and torchvision models; picks up where it stopped
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/tables.py

docs: setup  ## fill the tables of README and docs from the newest results, run its examples
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python -m pytest -q tests/test_readme.py tests/test_tables.py

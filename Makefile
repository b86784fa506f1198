# `make demo` and `make test` make what they need: a virtual environment in .venv with pinned versions.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SOURCES := r2m_kernels python/r2m tests bench setup.py

# One BLAS thread a process: two test workers with two threads each fight over two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 300 --timeout-method thread

.PHONY: help demo test test-all check format bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

$(READY): requirements.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(READY)  ## specialists trained on real faces, merged and judged: table and pictures under demo/
	$(BIN)/r2m demo --out demo

test: check  ## lint, types, import contracts and tests
	$(PYTEST) -m "not slow"

test-all: $(READY)  ## the slow checks: the full demo, the wheel in an empty environment
	$(PYTEST) -n 1 --timeout 1800 -m slow

check: $(READY)  ## lint, types and import contracts alone
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/codespell $(SOURCES) *.md csrc
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## rewrite the sources as `make check` wants them
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(READY)  ## speed against full SVD in one run, as JSON under bench/results/
	$(BIN)/python -m bench.run

clean:  ## remove the environment and everything made
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

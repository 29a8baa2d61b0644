PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := deepspeed,quantization,gguf,report,test

.PHONY: help quickstart test test-fast test-oldest lint format clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(VENV)/.core  ## Train a small model with Step-DPO and print its accuracy before and after
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test  ## Run all the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: $(VENV)/.test  ## Run the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

test-oldest:  ## Run all the tests on the oldest supported TRL
	mkdir -p .venv-oldest
	floor=$$(sed -nE 's/.*"trl>=([0-9.]+).*/\1/p' pyproject.toml); \
	sed -E "s/^trl==[0-9.]+/trl==$$floor/" constraints.txt > .venv-oldest/constraints.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=.venv-oldest/constraints.txt

lint: $(VENV)/.dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was built
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Environments. The constraints pin what was tested, the CPU build of torch among it where pip finds one.
CONSTRAINTS ?= constraints.txt

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.core: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS := deepspeed,quantization,gguf,openai,ray,report,test

# Packages that bench-gpu needs in addition to torch. numpy, pandas and pyarrow are large and must be installed already.
PYTHON_VERSION ?= 3.12
MACHINE ?= x86_64
WHEELS := accelerate antlr4-python3-runtime anyio click datasets dill filelock fsspec h11 hf-xet httpcore2 httpx2 \
	huggingface_hub idna latex2sympy2_extended math-verify multiprocess packaging peft regex safetensors tokenizers \
	tqdm transformers trl truststore typing_extensions xxhash

VERSIONS := oldest newest py312 py313

.PHONY: help quickstart test test-all test-fast test-versions $(VERSIONS:%=test-%) fuzz browser \
	bench bench-long bench-data bench-gpu wheels lint format dist clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(VENV)/.core  ## Train a small model with Step-DPO and print its accuracy before and after
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test  ## Run the tests (up to seven minutes on two cores)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not long"

test-all: $(VENV)/.test  ## Run all tests, including the long ones
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: $(VENV)/.test  ## Run the tests that are not marked slow
	$(BIN)/python -m pytest -m "not slow and not long"

# On Python 3.11 the oldest supported versions together and the newest ones; on newer Pythons the tested ones. The
# contract tests run first and say what changed upstream.
test-versions: $(VERSIONS:%=test-%)  ## Run the tests on the oldest, the newest and the tested versions (needs 40 GB)

$(VERSIONS:%=test-%): test-%: .venv-%/.test
	.venv-$*/bin/python -m pytest -q tests/step_dpo/test_upstream_contract.py
	.venv-$*/bin/python -m pytest --numprocesses 2 --dist worksteal -m "not long"

FUZZ_SECONDS ?= 300
fuzz: $(VENV)/.test  ## Feed random hard texts to all parsers for FUZZ_SECONDS=300
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/test_parsers.py -k fuzz

# As root, on Debian and Ubuntu derivatives that have a package chromium
browser: $(VENV)/.test  ## Install Chromium and what tests/pipeline/test_human.py needs to run the labeling page in it
	apt-get update
	apt-get install --yes --no-install-recommends chromium
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[human]" playwright

bench: $(VENV)/.core  ## Compare the throughput with DPOTrainer on this CPU (15 minutes on two cores)
	mkdir -p build
	$(BIN)/python examples/benchmark_throughput.py --all --rounds 3 --steps 1 --json build/bench.json

bench-long: $(VENV)/.core  ## Train 2,000 updates in nine settings: memory, speed, files and processes left (half an hour)
	$(BIN)/python examples/benchmark_long_run.py

bench-data: $(VENV)/.core  ## Prepare a million pairs, and fewer with DPOTrainer too: speed and memory (two hours)
	$(BIN)/python examples/benchmark_large_data.py

# The wheels come first in PYTHONPATH, so other versions installed on the machine do not matter
bench-gpu: | build/wheels  ## Run bench for 7B parameters on a GPU with 80 GB (needs torch; no network after `make wheels`)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target build/bench_site build/wheels/*.whl
	PYTHONPATH=build/bench_site:. $(PYTHON) examples/benchmark_throughput.py \
		--all --config qwen2.5-7b --peft --rounds 4 --json build/bench-gpu.json

wheels:  ## Download the packages of bench-gpu, by default for PYTHON_VERSION=3.12 and MACHINE=x86_64
	rm -rf build/wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --constraint $(CONSTRAINTS) --dest build/wheels \
		--implementation cp --python-version $(PYTHON_VERSION) \
		--platform manylinux_2_28_$(MACHINE) --platform manylinux_2_17_$(MACHINE) --platform manylinux2014_$(MACHINE) \
		$(WHEELS)

build/wheels:
	$(MAKE) wheels

lint: $(VENV)/.dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# `twine upload dist/*` publishes the result
dist: $(VENV)/.dev  ## Build the wheel and the source distribution into dist/, and test them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -q tests/test_package.py

clean:  ## Remove environments, build outputs and caches
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Environments. The constraints pin the tested versions, including the CPU build of torch where it is available.
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

# uv resolves lower bounds, which pip cannot. It finds the Pythons of pyenv if they are on PATH.
.venv-uv/bin/uv: | $(BIN)/python
	$(BIN)/python -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv

.venv-oldest/.test: ARGUMENTS := --resolution lowest-direct
.venv-newest/.test: ARGUMENTS := --upgrade
.venv-py312/.test .venv-py313/.test: ARGUMENTS := --constraint $(CONSTRAINTS)
.venv-oldest/.test .venv-newest/.test: INTERPRETER := 3.11
.venv-py312/.test: INTERPRETER := 3.12
.venv-py313/.test: INTERPRETER := 3.13
$(VERSIONS:%=.venv-%/.test): export PATH := $(PATH):$(subst $(eval) ,:,$(wildcard $(HOME)/.pyenv/versions/3.*/bin))
$(VERSIONS:%=.venv-%/.test): pyproject.toml $(CONSTRAINTS) | .venv-uv/bin/uv
	.venv-uv/bin/uv venv --quiet --clear --python $(INTERPRETER) $(@D)
	.venv-uv/bin/uv pip install --quiet --python $(@D) $(ARGUMENTS) --editable ".[$(EXTRAS)]"
	touch $@

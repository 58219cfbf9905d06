# Two commands: `make train` and `make test`. Both set up `.venv` first; on a set-up machine that takes no time.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
INSTALLED := $(VENV)/.installed

# Each process would otherwise compile this project's own modules again; a job even in its unpacked copy.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help train doctor test slow hosts fast lint types check bench ui serve requirements clean

help:  ## show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1|/' | column -t -s '|'

# The environment is a function of requirements.txt: every package pinned by version and hash.
# Byte code is compiled at once, because each Ray process would otherwise compile torch and ray again.
$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and f"re2tal needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Choose another with: make PYTHON=/path/to/python3")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

train: $(INSTALLED)  ## make the toy data if missing and train on it; ARGS="RECIPE --field value" changes the run
	$(BIN)/python pipelines/train.py $(ARGS)

doctor: $(INSTALLED)  ## look at the installation, or the cluster at RAY_ADDRESS, and say what to mend; ARGS="--output URI"
	$(BIN)/python pipelines/doctor.py $(ARGS)

# In two processes: much of the suite waits for Ray and for scripts to start. tests/conftest.py says which tests
# share a process, and in which order.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --dist

test: $(INSTALLED)  ## the test suite but for its longest chains; ARGS="-k name" selects
	$(PYTEST) loadscope -m "not hosts and not long" $(ARGS)

# Beside the environment, as the peers below: one test needs it, nothing that is installed does.
LIGHTNING := $(VENV)/lightning
$(LIGHTNING): $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps --group lightning
	@touch $@

slow: $(INSTALLED) $(LIGHTNING)  ## the longest chains: a job and a sweep that are killed, reproduce.py --quick; Lightning
	PYTHONPATH=$(LIGHTNING) $(PYTEST) loadfile -m long $(ARGS)

hosts: $(INSTALLED)  ## a run on several hosts, one of which dies; ten minutes, as root, the machine to itself
	$(BIN)/python -m pytest -m hosts $(ARGS)

fast: $(INSTALLED)  ## the tests that need neither Ray nor much time
	$(BIN)/python -m pytest -m "not slow and not hosts" $(ARGS)

lint: $(INSTALLED)  ## ruff, format and rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy
	$(BIN)/mypy

check: lint types test slow  ## all that CI runs

# The peers are installed beside the environment, never into it: nothing but these commands sees them.
PEERS := $(VENV)/peers
$(PEERS): $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps decord==0.6.0 torchcodec==0.17.0
	@touch $@

bench: $(INSTALLED) $(PEERS)  ## decoding against decord and torchcodec (which needs FFmpeg's libraries), streaming, shards
	PYTHONPATH=$(PEERS) $(BIN)/python -m pipelines.experiments decoding
	$(BIN)/python -m pipelines.experiments throughput
	$(BIN)/python -m pipelines.experiments shards --threads 1

ui: $(INSTALLED)  ## open the MLflow UI on the runs of this checkout
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///runs/mlflow.db

serve: $(INSTALLED)  ## answer requests with a model of MLflow on port 5001: make serve MODEL=models:/NAME/1
	PATH="$(CURDIR)/$(BIN):$$PATH" MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-sqlite:///runs/mlflow.db}" \
	  $(BIN)/mlflow models serve --model-uri $(MODEL) --env-manager local --port 5001 $(ARGS)

requirements: $(INSTALLED)  ## compile requirements.txt anew from the ranges in pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra backbones --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet --upgrade --output-file requirements.txt

clean:  ## remove the environment, the toy data and the runs
	rm -rf $(VENV) data runs

# The one command surface, the same for people and for CI. Every target does its own set-up.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Commands that tests need beside Python, each with the Debian package that has it.
SYSTEM_COMMANDS := chromium:chromium curl:curl docker-compose:docker-compose faketime:faketime g++:g++ \
  openssl:openssl promtool:prometheus redis-cli:redis-tools strace:strace
# And files, with the package that has them.
SYSTEM_FILES := /usr/include/lua5.1/lua.h:liblua5.1-0-dev /usr/lib/postgresql/*/bin/postgres:postgresql

# Tests wait more than they compute: on two cores this many processes at once are done soonest.
TEST_PROCESSES ?= 4

# The machine with the GPU: the wheels for it, its version of Python, and the Python there that has torch.
GPU_WHEELS ?= build/gpu-wheels
GPU_PYTHON ?= 3.12
GPU_RUN ?= python3

.PHONY: help demo up test check bench bench-gpu gpu-wheels faults model dist digits images screenshots system-packages clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 13

demo: $(VENV)/.embedded  ## set up, then classify real digits with a stack of its own (ARGS=--keep)
	$(BIN)/samphire demo $(ARGS)

up: $(VENV)/.embedded  ## run the stack on this machine until Ctrl-C
	$(BIN)/samphire up $(ARGS)

test: $(VENV)/.dev system-packages  ## run the tests, against real servers (ARGS="-k lane", ARGS="-n0 tests/test_store.py")
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder $(ARGS)

check: $(VENV)/.dev  ## formatting, lints, types, import rules, lengths of files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=clients/python:broker:workers $(BIN)/lint-imports --no-cache
	@find broker clients workers benchmarks -name '*.py' -o -name '*.lua' | xargs awk \
	  'FNR == 401 {print FILENAME ": over 400 lines: make two of it"; long = 1} END {exit long}'

bench: $(VENV)/.dev  ## measure beside a straight client and plain Celery (ARGS="--only drain", "--runs 9"); BASE=COMMIT: by turns with it
	$(BIN)/python -m benchmarks $(if $(BASE),--base $(BASE)) $(ARGS)

bench-gpu:  ## measure on a GPU, with the wheels of gpu-wheels and the machine's own Python and torch
	GPU_WHEELS=$(GPU_WHEELS) $(GPU_RUN) benchmarks/gpu_setup.py $(ARGS)

gpu-wheels: $(VENV)/.dev  ## collect what bench-gpu needs on a machine without a network, 60 MiB at most (GPU_PYTHON=3.12)
	$(BIN)/python -m benchmarks.gpu_wheels --python $(GPU_PYTHON) --folder $(GPU_WHEELS)

faults: $(VENV)/.dev  ## kill, stop and restart every part under load, up to two hours (ARGS="--worker-kill 50", ARGS=--soak)
	$(BIN)/python -m tests.faults $(ARGS)

model: $(VENV)/.dev system-packages  ## explore the task protocol state by state, 40 minutes (ARGS="chain1 roll4", ARGS=mutants)
	$(BIN)/python -m tests.protocol $(ARGS)

dist: $(VENV)/.dev  ## build wheel and sdist into dist/, with the version of the newest tag (docs/release.md)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

digits: $(VENV)/.dev  ## train the shipped digits model again
	$(BIN)/python -m samphire_workers.training.digits model_repository

images: $(VENV)/.dev system-packages  ## install what each Docker image installs, and run it (one of them is part of the tests)
	SAMPHIRE_IMAGES=all $(BIN)/python -m pytest tests/test_images.py

screenshots: $(VENV)/.dev system-packages  ## take the pictures of Flower in docs/ again
	SAMPHIRE_SCREENSHOTS=docs $(BIN)/python -m pytest tests/test_flower.py -k browser

# Root installs what is missing; anyone else is told, and the tests that need it are skipped.
system-packages:
	@missing=; for pair in $(SYSTEM_COMMANDS); do \
	  command -v "$${pair%%:*}" > /dev/null || missing="$$missing $${pair##*:}"; \
	done; \
	for pair in $(SYSTEM_FILES); do \
	  ls $${pair%%:*} > /dev/null 2>&1 || missing="$$missing $${pair##*:}"; \
	done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  echo "installing$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing \
	    > /dev/null; \
	else \
	  echo "not installed, some tests need them:$$missing"; \
	fi

clean:  ## remove the virtual environment, caches and wheels
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@test "$$($(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))')" = True || \
	  { echo "Python 3.11 is needed (found: $$($(PYTHON) --version)); set PYTHON=/path/to/python3.11"; exit 1; }
	@command -v setpriv > /dev/null || { echo "setpriv is needed: apt-get install util-linux"; exit 1; }
	@echo "making the virtual environment $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.embedded: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing samphire[embedded]: a few minutes on the first run"
	$(PIP) --editable '.[embedded]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing samphire[dev]: a few minutes on the first run"
	$(PIP) --editable '.[dev]'
	@touch $@
	@touch $(VENV)/.embedded

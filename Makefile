# make train   train on the embedded data; `make train ARGS="trainer.epochs=5"` changes settings
# make quick   style, types and the unit tests of less than a second: after every change, under a minute
# make test    all tests but those that need a GPU or take minutes; `make test ARGS="-k resume"` picks some
# make gpu     tests that need a CUDA device
# make lint    style and types
# make golden  what trained runs end with, here and at the revision BASE, compared bit for bit
# make lowest  the tests with the lowest versions that pyproject.toml allows
# make lock    write constraints.txt anew, with the newest versions
# make clean   remove environments and outputs
# make help    this list

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Versions with which the tests passed. A release of tomorrow, or its types, stops nobody's `make test`.
LOCK ?= constraints.txt
INSTALL = $(BIN)/python -m pip install --quiet $(if $(LOCK),--constraint $(LOCK))

# An idle process takes over from a busy one: whole trainings lie beside tests of milliseconds.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

BASE ?= HEAD~1

.PHONY: train quick test gpu lint golden lowest lock clean help

train: $(VENV)/installed
	$(BIN)/python -m adaptive_trainer $(ARGS)

quick: lint
	$(PYTEST) -m "not gpu and not slow and not long" tests/unit $(ARGS)

test: $(VENV)/installed-dev
	$(PYTEST) $(ARGS)

gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu tests $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(INSTALL) --editable ".[nvml]"
	touch "$@"

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --group dev
	touch "$@"

golden: $(VENV)/installed-dev
	$(BIN)/python scripts/golden.py compare $(BASE)

lowest:
	python3 scripts/lowest_versions.py > .lowest.txt
	$(MAKE) test VENV=.venv-lowest LOCK=.lowest.txt

# The oldest Python decides: what it can install, the newer ones can too.
lock:
	$(MAKE) .venv-lock/installed-dev VENV=.venv-lock LOCK= PYTHON=python3.11
	.venv-lock/bin/python -m pip freeze --exclude-editable > constraints.txt

clean:
	rm -rf $(VENV) .venv-lowest .venv-lock .lowest.txt outputs multirun

help:
	@sed -n 's/^# make/make/p' Makefile

# make train   environment, install, then the main job on the embedded data
# make test    environment, install, then the tests, types and style

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: train test lint clean

train: $(VENV)/installed
	$(BIN)/python -m adaptive_trainer $(ARGS)

test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[nvml]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

clean:
	rm -rf $(VENV) outputs multirun

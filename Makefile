# Every target does its own set-up: a virtual environment in .venv, made again when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-full lint types bench docs clean
.DEFAULT_GOAL := help

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(READY): pyproject.toml constraints.txt src/armorm/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## The whole method on a generated corpus, offline, in about a minute.
	$(BIN)/armorm demo --output runs/demo

test: $(READY)  ## The fast tests.
	$(BIN)/python -m pytest

test-full: $(READY)  ## All tests, the slow ones too.
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(READY)  ## Format and lint, checked.
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks

types: $(READY)  ## Types, checked.
	$(BIN)/mypy

bench: $(READY)  ## The benchmarks; tables here, JSON under benchmarks/results/.
	$(BIN)/python benchmarks/real_ratings.py

clean:  ## Remove what was built, not what was trained.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

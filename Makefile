# Everything runs in .venv, which the first target that needs it makes.  A clean machine needs Python 3.11 and make.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3.13 || command -v python3.12 || command -v python3)
SOURCES := src tests benchmarks examples
PIP_FLAGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint format types bench docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## train a small model on synthetic scenes and write its report
	@$(BIN)/tercet demo

# Threads that spin while they wait slow down the processes that tests start beside one another.
test: lint types  ## lint, types and all fast tests
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

lint: $(VENV)/.installed-dev  ## check style
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed-dev  ## check types
	@$(BIN)/pyright

format: $(VENV)/.installed-dev  ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.installed-dev  ## time a training step of the base model on this machine
	@$(BIN)/python benchmarks/step.py

docs: $(VENV)/.installed-docs  ## build the documentation into site/, strictly
	@$(BIN)/python -m mkdocs build --quiet --strict

clean:  ## remove the environment and everything that was built; runs/ stays
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is older than 3.11; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "make: $(PYTHON) cannot make environments; install its venv module" >&2; exit 1; }

# The stamps are newer than what they were made from, so a second call installs nothing.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once; this takes a few minutes)"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[track]'
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) with the tools of development (once; this takes a few minutes)"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing into $(VENV) with what the documentation needs (once)"
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	@touch $@

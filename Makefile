# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
# Two processes of one thread: CI has two cores, and the models are too small for a second thread to help.
PYTEST := -m pytest -n 2 --dist worksteal
STAMP := .venv/.installed
STAMP_LOWEST := .venv-lowest/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check test-lowest

help:
	@echo "make demo         train a small language model with GrAPE and with backpropagation, and compare (5 minutes)"
	@echo "make test         run the tests"
	@echo "make check        formatting, lint, types"
	@echo "make test-lowest  run the tests on the lowest versions supported, in a virtual environment of its own"
	@echo "make setup        make .venv with everything; the others call it"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== Set-up: making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "grape_hf needs Python 3.11 or later; name one: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== Set-up: installing grape_hf and what it needs, in the versions of constraints.txt (some minutes, 5 GB)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[vision,plot,test]'
	@touch $@
	@echo "== Set-up: done"

demo: setup
	@$(BIN)/python recipes/demo.py

test: setup
	@echo "== Tests"
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

check: setup
	@echo "== Format, lint, types"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

$(STAMP_LOWEST): pyproject.toml constraints-lowest.txt
	@echo "== Set-up: making .venv-lowest with the versions of constraints-lowest.txt (some minutes, 5 GB)"
	@test -x $(LOWEST)/python || $(PYTHON) -m venv .venv-lowest
	@$(LOWEST)/python -m pip install -q --disable-pip-version-check -c constraints-lowest.txt -e '.[vision,plot,test]'
	@touch $@

test-lowest: $(STAMP_LOWEST)
	@echo "== Tests on the lowest versions"
	@OMP_NUM_THREADS=1 $(LOWEST)/python $(PYTEST)

# `make demo` and `make test` install what they need into .venv and need nothing but Python 3.11 or 3.12.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-all test lint swarm attacks bench package dev clean

demo: $(VENV)/.demo
	$(BIN)/p2pasr demo run --out demo-out

demo-all: $(VENV)/.demo
	$(BIN)/p2pasr demo all --out demo-all-out

# Real peers need the machine for themselves; everything else runs on all cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not swarm' --numprocesses auto --dist loadfile
	$(BIN)/python -m pytest -m swarm

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

swarm: $(VENV)/.dev
	$(BIN)/python -m pytest tests/swarm

attacks: $(VENV)/.dev
	$(BIN)/python -m pytest tests/attacks
	$(BIN)/python -m benchmarks attacks
	$(BIN)/python -m benchmarks attacks --honest
	$(BIN)/python -m benchmarks excision
	$(BIN)/python -m benchmarks attacks --real
	$(BIN)/python -m benchmarks attacks --harm

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks averaging
	$(BIN)/python -m benchmarks training
	$(BIN)/python -m benchmarks swarm
	$(BIN)/python -m benchmarks window
	$(BIN)/python -m benchmarks window --speed

package: $(VENV)/.dev
	$(BIN)/python -m build

dev: $(VENV)/.dev
	$(BIN)/pre-commit install

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo-out demo-all-out build dist

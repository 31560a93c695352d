# Two commands: `make demo` and `make test`. Both set everything up first, in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
FUZZ_MINUTES ?= 10
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-all fuzz check format wire clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: setup
	$(BIN)/isthmus demo --out runs/demo

test: setup check
	$(BIN)/python -m pytest

test-all: setup check
	$(BIN)/python -m pytest -m ''

fuzz: setup
	PYTHONPATH=tests:. $(BIN)/python -m fuzz --minutes $(FUZZ_MINUTES)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wire: setup
	$(BIN)/python -m common.wire.generate

clean:
	rm -rf $(VENV) build dist *.egg-info

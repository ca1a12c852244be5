# Everything lives in .venv: nothing outside the folder is installed or changed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test test-long test-gpu lint clean

help:
	@echo "make demo       fit 1.5 million photograph patches in less memory than they take"
	@echo "make test       lint, type-check, all fast tests (under 10 minutes on 2 cores)"
	@echo "make test-long  soak, kills and larger properties"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make clean      remove .venv and the demo's output"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/streamgmm demo --output demo-run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_layers.py

test: lint
	$(BIN)/python -m pytest -n 2 -m "not gpu and not long"

test-long: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "long and not gpu" --timeout 1500

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis

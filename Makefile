# `make demo` and `make test` set everything up in .venv on first use.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/springtide demo

test: lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

KERNELS = CMakeLists.txt $(wildcard src/springtide/kernels/cpu/*)

$(READY): pyproject.toml $(KERNELS)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist

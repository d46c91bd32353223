# Two commands: `make demo` runs the main job on a small synthetic checkpoint, `make test` runs the test suite.
PYTHON ?= python3
BIN := .venv/bin
DEMO_OUTPUT ?= demo-output

.PHONY: demo test test-full check bench docs clean

demo: .venv/installed
	$(BIN)/v4quant demo $(DEMO_OUTPUT) --overwrite

test: .venv/installed
	$(BIN)/python -m pytest -n 2

test-full: .venv/installed
	$(BIN)/python -m pytest -n 2 -m ''

# Formatting, lint and types; CI runs it before the tests.
check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/casts.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/shard.py
	$(BIN)/python benchmarks/inspect_.py
	$(BIN)/python benchmarks/gpu_kernels.py

docs: .venv/installed
	$(BIN)/python -m tests.cli.command_reference > docs/cli.md

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv $(DEMO_OUTPUT)

# Two commands do all set-up on a machine with git, make and Python (with pip): `make demo` and `make test`.
PYTHON ?= python3
# A package index to take torch from, where the usual one has no build that suits (README.md, "See it work").
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: venv demo test lint bench simulate data clean

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)
	$(INSTALL) --editable '.[dev]'
	touch $@

# A real model, a small task, general data and the arms side by side; ends with a table and the path of the report.
demo: venv
	$(BIN)/fulcrum models pull smollm2-135m-instruct
	$(BIN)/fulcrum compare examples/demo.yaml --resume

test: venv lint
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check src tests scripts bench
	$(BIN)/ruff format --check --quiet src tests scripts bench
	$(BIN)/mypy

# Fulcrum against its peers on the same rows, in one run: `make bench BENCH="--mixes general --rounds 2"`. Hours, as it stands.
BENCH ?=
bench: venv bench/.venv-hf/.installed bench/.venv-swift/.installed
	$(BIN)/python bench/speed.py $(BENCH)

bench/.venv-%/.installed: bench/requirements-%.txt
	$(PYTHON) -m venv bench/.venv-$*
	bench/.venv-$*/bin/python -m pip install --quiet --requirement $<
	touch $@

# Whether intervals cover what they claim: planted savings, nulls and flat curves, 1,000 experiments each. Some minutes.
simulate: venv
	$(BIN)/python scripts/simulate.py

# Makes the packaged data again: the demo task in seconds, the pool in about 20 minutes.
data: venv
	$(BIN)/python scripts/make_demo_task.py
	$(BIN)/python scripts/make_builtin_pool.py

clean:
	rm -rf .venv bench/.venv-* runs build dist

# Two commands do all set-up on a machine with git, make and Python (with pip): `make demo` and `make test`.
PYTHON ?= python3
# A package index to take torch from, where the usual one has no build that suits (README.md, "Two commands").
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# One thread for each of two workers; processes that tests start read compiled files.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: venv demo test test-fast lint docs check soak mutants lock release bench validate data clean

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
	$(PYTEST)

# All but real processes, the browser, the real model, whole comparisons and the commands of the docs: under four minutes.
test-fast: venv
	$(PYTEST) -m "not e2e"

lint: venv
	$(BIN)/ruff check src tests scripts bench validation
	$(BIN)/ruff format --check --quiet src tests scripts bench validation
	$(BIN)/mypy

# docs/reference/, anew from the code; a test fails where it is stale.
docs: venv
	$(BIN)/python scripts/reference.py

# Whether what is installed is what is locked, has its reason, and is not known to be vulnerable (where that can be looked up).
check: venv lint
	$(INSTALL) --editable '.[release]'
	$(BIN)/python scripts/check_supply.py

# Real processes killed, faults planted, a million fuzzed inputs; prints what was lost. About half an hour.
SOAK ?=
soak: venv
	$(INSTALL) --editable '.[soak]'
	$(BIN)/python scripts/soak.py $(SOAK)

# Small changes to five modules, one at a time: do their tests notice? About an hour; `mutmut results` names those that live.
mutants: venv
	$(INSTALL) --editable '.[soak]'
	$(BIN)/mutmut run

# The tested versions with their hashes: of what users install, and of that and what tests need.
LOCK := $(BIN)/uv pip compile pyproject.toml --constraint constraints.txt --generate-hashes --no-annotate --no-header --quiet
lock: venv
	$(INSTALL) --editable '.[release]'
	$(LOCK) --output-file locks/run.txt
	$(LOCK) --extra dev --output-file locks/dev.txt

# A wheel, and the list of materials of what it needs.
release: check
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .
	$(BIN)/cyclonedx-py requirements locks/run.txt --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.cdx.json

# Fulcrum against its peers on the same rows, in one run: `make bench BENCH="--mixes general --rounds 2"`. Hours, as it stands.
BENCH ?=
bench: venv bench/.venv-hf/.installed bench/.venv-swift/.installed
	$(BIN)/python bench/speed.py $(BENCH)

bench/.venv-%/.installed: bench/requirements-%.txt
	$(PYTHON) -m venv bench/.venv-$*
	bench/.venv-$*/bin/python -m pip install --quiet --requirement $<
	touch $@

# Whether the tool finds what was planted and nothing else: intervals over 1,000 experiments a case, curves with and without jumps,
# skills in a toy network, and a task whose skill lies in general data alone, on the default model. Plots come to build/validation.
validate: venv
	$(BIN)/python validation/simulate.py
	$(BIN)/python validation/simulate_folds.py
	$(BIN)/python validation/simulate_scaling.py
	$(BIN)/python validation/parity.py --out build/validation/parity
	$(BIN)/python validation/planted.py build/validation/planted

# Makes the packaged data again: the demo task in seconds, the pool in about 20 minutes.
data: venv
	$(BIN)/python scripts/make_demo_task.py
	$(BIN)/python scripts/make_builtin_pool.py

clean:
	rm -rf .venv bench/.venv-* runs build dist mutants

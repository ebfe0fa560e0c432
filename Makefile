# `make demo` and `make test` need nothing but Python 3.11 or later and a network for packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= runs/demo

.PHONY: demo test long lint types docs pages bench clean

demo: $(VENV)/made
	$(BIN)/llm-narrow prune --model smollm2-135m --domain python --out $(OUT) --force

test: $(VENV)/made-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" --durations 15

long: $(VENV)/made-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m long

lint: $(VENV)/made-dev
	$(BIN)/ruff check .

types: $(VENV)/made-dev
	$(BIN)/mypy

# The site, in build/site: it opens from the disk.
docs: $(VENV)/made-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Pages and pictures of docs/ that are made from the declarations, and are in the repository.
pages: $(VENV)/made-dev
	$(BIN)/python examples/docs/architectures.py
	$(BIN)/python examples/docs/pictures.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamps are made last, so that an installation that was interrupted is done again.
$(VENV)/made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or later is needed, and '$(PYTHON)' is not one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) …"
	@$(PIP) pip setuptools
	@$(PIP) --no-build-isolation -e '.[report,tracking]'
	@touch $@

$(VENV)/made-dev: $(VENV)/made
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# The figures of docs/results.md. Hours on two cores; a command that was stopped goes on where it was.
bench: $(VENV)/made-dev
	$(BIN)/python examples/bench/criteria.py
	$(BIN)/python examples/bench/peers.py
	$(BIN)/python examples/bench/costs.py
	$(BIN)/python examples/bench/steps.py
	$(BIN)/python examples/bench/recovery.py
	$(BIN)/python examples/bench/survival.py
	test -f $(OUT)/manifest.json || $(MAKE) demo
	$(BIN)/python examples/bench/performance.py --run $(OUT)
	$(BIN)/python examples/neox/train.py --out runs/neox
	$(BIN)/python examples/neox/show.py --model runs/neox --out docs/bench/neox

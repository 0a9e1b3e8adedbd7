# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv, everything from the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast test-patches lint docs clean

demo: $(VENV)/.installed
	$(BIN)/muscle-plugin demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

# Without the tests marked slow: for the daily loop.
test-fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow"

# The patches to USB, each proven by its case: USB=<folder of a checkout>; without it, on the release.
test-patches: $(VENV)/.installed-dev
	$(BIN)/python patches/check.py $(USB)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# An installation counts once it has ended; one that was cut off is done again. A newer pyproject.toml renews it.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --quiet torch torchvision
	$(BIN)/python -m pip install --progress-bar off --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --progress-bar off --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) site .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# `make demo` and `make test` do all set-up themselves: a virtual environment in .venv, everything from the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-patches lint clean

demo: $(VENV)/.installed
	$(BIN)/muscle-plugin demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

# The patches to USB, each proven by its case: USB=<folder of a checkout>; without it, on the release.
test-patches: $(VENV)/.installed-dev
	$(BIN)/python patches/check.py $(USB)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

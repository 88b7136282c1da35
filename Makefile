# Two commands do everything on a fresh machine: `make demo` and `make test`. Both build .venv first.
PYTHON ?= python3
# CONSTRAINTS=constraints-lowest.txt tries the lowest versions that pyproject.toml promises
CONSTRAINTS ?= constraints.txt
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint docs dist clean

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/ptq demo --out demo-out

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site: a broken link, reference or docstring is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist; then the wheel alone, in an empty environment and folder, does a small demo.
dist: TRIAL := $(CURDIR)/build/trial
dist:
	rm -rf dist build
	$(PYTHON) -m venv $(TRIAL)
	$(TRIAL)/bin/python -m pip install --quiet build
	$(TRIAL)/bin/python -m build --outdir dist
	rm -rf $(TRIAL) && $(PYTHON) -m venv $(TRIAL)
	$(TRIAL)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(TRIAL)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	cd build && $(TRIAL)/bin/ptq demo --format hif4 --units 4 --out trial-demo
	@du -h dist/*
	rm -rf build

clean:
	rm -rf $(VENV) demo-out build dist

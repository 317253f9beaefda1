# Both main targets build .venv by themselves; nothing but Python 3.11+, make and a compiler is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.installed-to-run
STAMP := $(VENV)/.installed-to-develop
PIP := $(BIN)/pip install -q --no-compile --disable-pip-version-check -c constraints.txt
# On all cores, where pip would take a minute of one; a file that is no Python of today stays as it is.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 $(CURDIR)/$(VENV)/lib || true

.PHONY: demo test test-slow lint bench clean

demo: $(RUNS)
	$(BIN)/hyperlora demo --workdir demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q --durations=15

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)
	$(BIN)/python tools/bench.py all --json docs/measurements/bench_cpu.json

# What the demo and the page need; what tests need besides is added to the same .venv.
$(RUNS): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e ".[torch,avatars,serve]"
	$(COMPILE)
	touch $(RUNS)

$(STAMP): $(RUNS)
	$(PIP) -e ".[torch,avatars,serve,dev,tpu]"
	$(COMPILE)
	touch $(STAMP)

clean:
	rm -rf demo runs

# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.10+, a C++17
# compiler and make; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
NATIVE  = pyproject.toml constraints.txt $(shell find native -type f)

.PHONY: demo test test-slow lint format bench docs sanitize cross clean

demo: $(VENV)/.demo
	$(BIN)/prunus demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/inference/linear.py
	$(BIN)/python benchmarks/inference/demo.py

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

sanitize: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" sh native/sanitize.sh

# The kernels for 64-bit ARM under qemu; skips with a reason without cross compiler or emulator.
cross:
	PATH="$(abspath $(BIN)):$$PATH" sh native/cross.sh

clean:
	rm -rf build dist site $(VENV)

# torch comes first and alone: an open range would pull gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(NATIVE)
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(NATIVE)
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e ".[docs]"
	touch $@

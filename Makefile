# make demo    the main job, end to end, on synthetic tiles        make check   lint, format, strict types
# make test    everything that is tested, checks included          make clean   remove what make made
# make bench   how fast this machine trains and classifies, and what limits it
# Each sets up .venv from requirements.lock first; Python 3.11 or newer is all that is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo bench check test lock clean

help:
	@sed -n 's/^# //p' Makefile

setup: $(READY)

# uv, pinned in the lock like the rest, installs the lock; compiled bytecode saves every later start seconds.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tilefleet needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r $(VENV)/uv.lock
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python --editable .
	@touch $@

demo: $(READY)
	$(BIN)/tilefleet demo --out demo

bench: $(READY)
	$(BIN)/tilefleet bench ingest
	$(BIN)/tilefleet bench train
	$(BIN)/tilefleet bench classify

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Unit tests share the cores. Those that start Ray or processes of their own mostly wait: two files of them at a time.
test: check
	$(BIN)/pytest --numprocesses auto --dist worksteal -m "not ray and not process"
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m "ray or process"

lock: $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra dev \
		--no-header pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

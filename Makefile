# Everything a fresh machine needs is Python 3.11 or newer: the first target that wants it makes .venv.
# Another Python: make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# torch is large: uv's default of 30 seconds without a byte is short on a slow line
UV_HTTP_TIMEOUT ?= 300
export UV_HTTP_TIMEOUT

# tests and benchmarks start hundreds of programs, each of which would compile anew all that it imports
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: demo test bench lint ui clean help

demo: $(STAMP)  ## Index the sample photos, run three queries, open the UI (NO_UI=1: without the UI)
	$(BIN)/photoblip demo $(if $(NO_UI),--no-ui)

test: $(STAMP)  ## Run the tests (ARGS="-k rerank": pytest's own options)
	@$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

bench: $(STAMP)  ## Run the benchmarks, one after another (ARGS: passed on)
	$(BIN)/python -m tests.benchmarks $(ARGS)

lint: $(STAMP)  ## Check style, format and the import contracts; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

ui: $(STAMP)  ## Open the search page in the browser
	$(BIN)/photoblip ui

# .venv and runs/ stay: one is slow to make again, the other holds trained models
clean:  ## Remove caches, builds and the demo's library
	rm -rf build dist .demo .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

# pip only fetches uv, which installs the rest in a fraction of the time
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "photoblip needs Python 3.11 or newer: run make with PYTHON=/path/to/a/newer/python3." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -e '.[demo,train,evaluate,dev]' -c constraints.txt
	@touch $@

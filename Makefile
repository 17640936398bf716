# `make demo` and `make test` need Python >= 3.10 and nothing else: each makes .venv and installs what it lacks
# (with uv when it is there, with pip when not). tools/bootstrap.py does it, and says why when it cannot.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

# One thread: on shared cores, two threads of torch wait for each other and are up to ten times slower.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help python venv-demo venv install demo lint format docs docs-hosts test test-all wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

python:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' is not on PATH. Install Python 3.10 or newer, or run: make PYTHON=/path/to/python ..."; exit 1; } >&2

venv-demo: python
	@$(PYTHON) tools/bootstrap.py demo

venv: python
	@$(PYTHON) tools/bootstrap.py all dev

install: venv ## make .venv with every extra and the developer's tools

demo: venv-demo ## reduce the bundled models on bundled data: prints tables, writes pictures (ARGS="--task video" chooses)
	$(BIN)/tokred bench $(ARGS)
	$(if $(ARGS),,$(BIN)/tokred bench --task vqa --levels 0.25)
	@echo; echo "Next: $(BIN)/tokred demo (in a browser), $(BIN)/tokred bench --all (every method, one page)"

lint: venv ## ruff (rules and format) and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: venv ## rewrite the tree as `make lint` wants it
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: venv ## build the documentation site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-hosts: venv ## write docs/hosts.md, the page of models and refusals, from the code
	$(BIN)/python -m tokred.eval.hosts_page > docs/hosts.md

test: lint ## lint, then the tests (ARGS="-k tome" chooses some)
	$(ONE_THREAD) $(BIN)/python -m pytest $(ARGS)

test-all: lint ## the same with the full matrix of hosts and methods
	$(ONE_THREAD) $(BIN)/python -m pytest --all $(ARGS)

wheel: venv ## build the sdist and the wheel into dist/
	$(BIN)/python -m build

clean: ## remove what was built and cached, .venv included
	rm -rf $(VENV) build dist outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

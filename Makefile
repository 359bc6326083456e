# The few commands people type. Each installs what it needs into .venv first.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= training/configs/digits.toml
# Where an NVIDIA driver is, ONNX Runtime's CUDA build; elsewhere its CPU build. They exclude each other.
ORT ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: serve test lint train report openapi clean

serve: $(VENV)/.serve-$(ORT)
	$(BIN)/python -m service --port $(PORT)

test: $(VENV)/.dev-$(ORT) lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev-$(ORT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

train: $(VENV)/.dev-$(ORT)
	$(BIN)/python -m training fit $(CONFIG)

# Rewrites what is generated: the README's results and answers, and the OpenAPI document.
report: $(VENV)/.dev-$(ORT) openapi
	$(BIN)/python -m training report
	$(BIN)/python -m tests.readme

openapi: $(VENV)/.dev-$(ORT)
	$(BIN)/python -m service openapi > openapi/openapi.json

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# A stamp file for each set of packages: made anew when pyproject.toml changes.
$(VENV)/.serve-%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/.dev-%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*,train,dev]'
	@touch $@ $(VENV)/.serve-$*

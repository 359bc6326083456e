# The few commands people type. Each installs what it needs into .venv first.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= training/configs/digits.toml
# Where an NVIDIA driver is, ONNX Runtime's CUDA build; elsewhere its CPU build. They exclude each other.
ORT ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: serve test lint train report bench openapi fuzz deploy-check lock sbom audit clean
IMAGES := cpu gpu training

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

# The service beside LitServe, BentoML and MLServer, plain FastAPI and its own graphs: half an hour on an idle machine with two
# cores, then the README's table. make bench QUICK=1 takes minutes and only prints it.
QUICK ?=
bench: $(VENV)/.dev-$(ORT)
	$(BIN)/python -m tests.benchmarks $(if $(QUICK),--quick)

openapi: $(VENV)/.dev-$(ORT)
	$(BIN)/python -m service openapi > openapi/openapi.json

# schemathesis for a while, with all it knows, against a service that is up: make serve, and in another terminal make fuzz.
FUZZ_SECONDS ?= 1200
fuzz: $(VENV)/.dev-$(ORT)
	SCHEMATHESIS_HOOKS=tests.fuzzing PYTHONPATH=. $(BIN)/schemathesis run http://localhost:$(PORT)/openapi.json \
		--continue-on-failure --max-response-time 5 --max-time $(FUZZ_SECONDS)

# What make test checks of docker/ and of bulk work with the tools it finds, with all of them: also needs promtool, prometheus and
# kubectl on the PATH, and installs Ray.
deploy-check: $(VENV)/.dev-$(ORT)
	$(BIN)/pip install --quiet --editable '.[$(ORT),bulk]'
	CONCORD_TEST_EVERYTHING=1 $(BIN)/python -m pytest tests/test_docker.py tests/service/test_dataset.py tests/service/test_bulk.py

# The images' packages, every file by its hash. What pyproject.toml still allows stays as it is; make lock UPGRADE=--upgrade takes
# the newest. PyTorch's CPU build comes from its own index or folder: UV_INDEX or UV_FIND_LINKS.
UPGRADE ?=
UV_COMPILE := $(BIN)/uv pip compile --quiet $(UPGRADE) --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock'
lock: $(VENV)/.release
	echo setuptools | $(UV_COMPILE) - --output-file docker/requirements-build.txt
	$(UV_COMPILE) pyproject.toml --extra cpu --extra otel --output-file docker/requirements-cpu.txt
	$(UV_COMPILE) pyproject.toml --extra gpu --extra otel --output-file docker/requirements-gpu.txt
	$(UV_COMPILE) pyproject.toml --extra cpu --extra train --output-file docker/requirements-training.txt

# What is in each image, as CycloneDX, to dist/.
sbom: $(VENV)/.release
	mkdir -p dist
	for image in $(IMAGES); do PYTHONWARNINGS=ignore $(BIN)/cyclonedx-py requirements docker/requirements-$$image.txt \
		--pyproject pyproject.toml --output-reproducible --output-file dist/sbom-$$image.json || exit 1; done

# Known vulnerabilities of what is in each image. A package nobody can tell about fails too.
audit: $(VENV)/.release
	for image in $(IMAGES); do $(BIN)/pip-audit --strict --require-hashes --disable-pip \
		--requirement docker/requirements-$$image.txt || exit 1; done

clean:
	rm -rf $(VENV) .venv-bench

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.release: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[release]'
	@touch $@

# A stamp file for each set of packages: made anew when pyproject.toml changes.
$(VENV)/.serve-%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/.dev-%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*,train,dev]'
	@touch $@ $(VENV)/.serve-$*

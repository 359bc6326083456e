# Each target installs what it needs into .venv first.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= training/configs/digits.toml
# ONNX Runtime's CUDA build if an NVIDIA driver is present, else its CPU build: they exclude each other.
ORT ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

.PHONY: serve test check lint train report bench openapi fuzz deploy-check lock sbom audit clean
IMAGES := cpu gpu training

serve: $(VENV)/.serve-$(ORT)
	$(BIN)/concord serve --port $(PORT)

test: $(VENV)/.dev-$(ORT) lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Lint, types and unit tests in under a minute; make test runs everything.
check: $(VENV)/.dev-$(ORT) lint
	$(BIN)/python -m pytest -q -n auto -m "not slow and not browser and not ray and not docker" tests/architecture tests/model \
		tests/service/api tests/service/inference/test_refinement.py tests/service/inference/test_scheduler.py tests/training/data

lint: $(VENV)/.dev-$(ORT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

train: $(VENV)/.dev-$(ORT)
	$(BIN)/concord fit $(CONFIG)

# Rewrites what is generated in the documents: results, examples, references, and the OpenAPI document.
report: $(VENV)/.dev-$(ORT) openapi
	$(BIN)/concord report
	$(BIN)/python -m tests.tools.documents
	$(BIN)/python -m tests.benchmarks.report

# The service next to LitServe, BentoML, MLServer, plain FastAPI and its own graphs: an hour on an idle machine with two
# cores; writes tests/benchmarks/README.md. make bench QUICK=1 takes 10 minutes and only prints the table.
QUICK ?=
ROUNDS ?=
bench: $(VENV)/.dev-$(ORT)
	$(BIN)/python -m tests.benchmarks $(if $(QUICK),--quick) $(if $(ROUNDS),--rounds $(ROUNDS))

openapi: $(VENV)/.dev-$(ORT)
	$(BIN)/concord openapi > openapi/openapi.json

# A longer run of schemathesis against a running service: make serve, and in another terminal make fuzz.
FUZZ_SECONDS ?= 1200
fuzz: $(VENV)/.dev-$(ORT)
	SCHEMATHESIS_HOOKS=tests.support.fuzzing PYTHONPATH=. $(BIN)/schemathesis run http://localhost:$(PORT)/openapi.json \
		--continue-on-failure --max-response-time 5 --max-time $(FUZZ_SECONDS)

# The tests of docker/ and of bulk jobs with every tool: needs promtool, prometheus and kubectl on the PATH, and installs Ray.
deploy-check: $(VENV)/.dev-$(ORT)
	$(BIN)/pip install --quiet --editable '.[$(ORT),bulk]'
	CONCORD_TEST_EVERYTHING=1 $(BIN)/python -m pytest tests/deploy tests/service/batch

# The images' packages, every file by its hash. Versions that pyproject.toml still allows stay; make lock UPGRADE=--upgrade takes
# the newest. PyTorch's CPU build comes from its own index or folder: UV_INDEX or UV_FIND_LINKS.
UPGRADE ?=
UV_COMPILE := $(BIN)/uv pip compile --quiet $(UPGRADE) --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
	--no-emit-package concord-mvae --python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command 'make lock'
lock: $(VENV)/.release
	echo setuptools | $(UV_COMPILE) - --output-file docker/requirements-build.txt
	$(UV_COMPILE) pyproject.toml --extra cpu --extra audio --extra otel --output-file docker/requirements-cpu.txt
	$(UV_COMPILE) pyproject.toml --extra gpu --extra audio --extra otel --output-file docker/requirements-gpu.txt
	$(UV_COMPILE) pyproject.toml --extra cpu --extra audio --extra train --output-file docker/requirements-training.txt

# The packages of each image, as CycloneDX, in dist/.
sbom: $(VENV)/.release
	mkdir -p dist
	for image in $(IMAGES); do PYTHONWARNINGS=ignore $(BIN)/cyclonedx-py requirements docker/requirements-$$image.txt \
		--pyproject pyproject.toml --output-reproducible --output-file dist/sbom-$$image.json || exit 1; done

# Known vulnerabilities of the packages of each image. A package that cannot be audited fails too.
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

# A stamp file for each set of packages, renewed when pyproject.toml changes.
$(VENV)/.serve-%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

# The link tree shows the folders under the names that they are installed as, for mypy.
$(VENV)/.dev-%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[$*,train,dev]'
	mkdir -p $(VENV)/types/concord
	for package in service model training; do ln -sfn ../../../$$package $(VENV)/types/concord/$$package; done
	ln -sfn ../../../service/client $(VENV)/types/concord/client
	@touch $@ $(VENV)/.serve-$*

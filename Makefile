# One target, one job. `make run` and `make test` set up what they need on a fresh clone.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OUT    := gen
PROTOS := $(sort $(wildcard proto/pointbook/v1/*.proto))

.PHONY: help setup run test soak lint format gen lock bench growth

help: ## List the targets.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Make .venv from requirements.lock.

$(STAMP): requirements.lock pyproject.toml gen/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e gen -e .
	touch $@

run: $(STAMP) ## Run the whole system on the embedded database.
	exec $(BIN)/pointbook dev

test: $(STAMP) ## Run the tests.
	$(BIN)/python -m pytest -n 2 -m "not soak"

soak: $(STAMP) ## Run the slow soak and chaos tests in full, and then `growth`.
	$(BIN)/python -m pytest -m soak
	$(BIN)/python bench/growth.py

lint: $(STAMP) ## Check style, types, layers, protos, the Dockerfile and that generated code is current.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/hadolint Dockerfile
	$(MAKE) --no-print-directory gen OUT=build/gen
	diff -r -x __init__.py -x py.typed -x __pycache__ build/gen/pointbook gen/pointbook

format: $(STAMP) ## Format the sources.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format -w

gen: $(STAMP) ## Generate the stubs from proto/.
	mkdir -p $(OUT)
	rm -f $(OUT)/pointbook/v1/*_pb2*
	$(BIN)/python -m grpc_tools.protoc -Iproto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=$(OUT) --grpc_python_out=$(OUT) \
	  --mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet,generate_concrete_servicer_stubs:$(OUT) $(PROTOS)

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-package pointbook-stubs

lock: $(STAMP) ## Resolve the dependencies anew: for developers, and for the image.
	$(LOCK) --upgrade --extra embedded --extra apprise --group dev pyproject.toml -o requirements.lock
	$(LOCK) --constraint requirements.lock pyproject.toml -o deploy/requirements.lock
	printf 'pip\nsetuptools\n' | $(LOCK) --constraint requirements.lock - -o deploy/build.lock

bench: $(STAMP) ## Measure, print a table and write bench/results.json.
	$(BIN)/python bench/run.py

growth: $(STAMP) ## Measure what a call costs at 10,000,000 entries, beside 10,000; writes bench/growth.json.
	$(BIN)/python bench/growth.py

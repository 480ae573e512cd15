# One target, one job. `make run` and `make test` set up what they need on a fresh clone.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    := gen
CLIENT := service/pointbook_client
PAGES  := docs/api-reference
OPENAPI := docs/openapi.json
AUDIT  := build/audit
PROTOS := $(sort $(wildcard proto/pointbook/v1/*.proto))
RELEASED := proto/released.binpb

.PHONY: help setup clean run test soak lint current format gen descriptors docs tables released dist lock sbom audit bench growth

help: ## List the targets.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Build .venv from requirements.lock, unless it is complete; PYTHON=… names another Python.
	@command -v "$(PYTHON)" > /dev/null \
	  || { echo "setup: there is no $(PYTHON): install Python 3.11 or later, or add PYTHON=/path/to/python3" >&2; exit 2; }
	@"$(PYTHON)" .ci/setup.py

clean: ## Remove .venv and all build output; the data of `pointbook dev` stays (see its --reset).
	rm -rf $(VENV) build dist examples/*/{dist,gen,node_modules,target}
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info */*.egg-info */*/*.egg-info
	find service gen tests bench -name __pycache__ -prune -exec rm -rf {} +

run: setup ## Run the whole system on the embedded database.
	exec $(BIN)/pointbook dev

# Three processes for two processors: tests of servers often wait. They read the tests as pytest has compiled them.
TEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist worksteal -m "not soak"

test: setup ## Run the tests.
	$(TEST)

soak: setup ## Run the slow soak and chaos tests in full, and then `growth`.
	SOAK_MINUTES=$${SOAK_MINUTES:-30} $(BIN)/python -m pytest -m soak
	$(TEST) --hypothesis-profile full tests/integration tests/property tests/unit
	$(BIN)/python bench/growth.py

lint: setup ## Check style, types, layers, protos, the Dockerfile, the documentation and that generated code is current.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format proto --diff --exit-code
	$(BIN)/buf breaking proto --against $(RELEASED)
	$(BIN)/hadolint Dockerfile
	$(MAKE) --no-print-directory current
	$(MAKE) --no-print-directory docs

current: setup ## Check that the stubs, the API reference, the OpenAPI document and the client are those of proto/.
	$(MAKE) --no-print-directory gen OUT=build/gen PAGES=build/api-reference OPENAPI=build/openapi.json CLIENT=build/client
	diff -r -x __init__.py -x py.typed -x __pycache__ build/gen/pointbook gen/pointbook
	diff -r build/api-reference docs/api-reference
	diff build/openapi.json docs/openapi.json
	diff build/client/reasons.py service/pointbook_client/reasons.py
	diff build/client/sync.py service/pointbook_client/sync.py
	diff deploy/client/service-config.json service/pointbook_client/service-config.json

format: setup ## Format the sources.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format proto -w

gen: setup ## Generate the stubs, the API reference, the OpenAPI document and parts of the client from proto/.
	mkdir -p build $(OUT)
	rm -f $(OUT)/pointbook/v1/*_pb2*
	$(BIN)/python -m grpc_tools.protoc -Iproto -I$(VENV)/protos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --python_out=$(OUT) --grpc_python_out=$(OUT) \
	  --mypy_out=quiet:$(OUT) --mypy_grpc_out=quiet,generate_concrete_servicer_stubs:$(OUT) $(PROTOS)
	$(BIN)/buf build --output build/contract.binpb
	rm -rf $(PAGES)
	$(BIN)/python .ci/api_reference.py build/contract.binpb $(PAGES)
	$(BIN)/python .ci/openapi.py build/contract.binpb $(OPENAPI)
	mkdir -p $(CLIENT)
	$(BIN)/python .ci/client_errors.py build/contract.binpb $(CLIENT)/reasons.py
	$(BIN)/python .ci/sync_client.py service/pointbook_client/client.py $(CLIENT)/sync.py
	$(BIN)/ruff format --quiet $(CLIENT)/reasons.py $(CLIENT)/sync.py
	cp deploy/client/service-config.json $(CLIENT)/

descriptors: OUT = build
descriptors: setup ## Build build/pointbook.binpb, the contract as Envoy reads it (deploy/envoy/json.yaml); OUT=… names another folder.
	mkdir -p $(OUT)
	$(BIN)/buf build --exclude-source-info --output $(OUT)/pointbook.binpb

docs: setup ## Build the documentation into build/docs; broken links and unlisted pages fail.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

tables: setup ## Write the generated tables of docs/ from the code.
	$(BIN)/python .ci/docs_tables.py

released: setup ## Make the protos the released contract that `lint` checks changes against; run it at a release.
	$(BIN)/buf build proto --exclude-source-info --output $(RELEASED)

dist: setup ## Write the wheels and source distributions of the last commit into dist/.
	@git diff --quiet HEAD || { echo "dist: files differ from the last commit: commit or stash them" >&2; exit 2; }
	rm -rf dist
	$(BIN)/python .ci/dist.py dist

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-package pointbook-stubs --no-emit-package pointbook-client

lock: setup ## Resolve the dependencies anew: for developers, and for the image.
	$(LOCK) --upgrade --extra embedded --extra apprise --extra otel --group dev pyproject.toml -o requirements.lock
	$(LOCK) --constraint requirements.lock --extra otel pyproject.toml -o deploy/requirements.lock
	printf 'pip\nsetuptools\n' | $(LOCK) --constraint requirements.lock - -o deploy/build.lock
	printf 'cyclonedx-bom\npip-audit\n' | $(LOCK) --upgrade - -o deploy/audit.lock

$(AUDIT): deploy/audit.lock
	rm -rf $(AUDIT)
	"$(PYTHON)" -m venv $(AUDIT)
	$(AUDIT)/bin/pip --quiet --disable-pip-version-check install --require-hashes --only-binary :all: -r deploy/audit.lock
	touch $(AUDIT)

sbom: $(AUDIT) ## Write build/sbom.cdx.json: what is in the image, as CycloneDX, from its lock file and our own parts.
	{ cat deploy/requirements.lock; grep -oE 'pointbook-(client|stubs)==[^"]+' pyproject.toml; } \
	  | $(AUDIT)/bin/cyclonedx-py requirements - --pyproject pyproject.toml --mc-type application \
	  --output-reproducible --output-format JSON --output-file build/sbom.cdx.json

audit: $(AUDIT) ## Look up the packages of both lock files among the known vulnerabilities; needs the network.
	$(AUDIT)/bin/pip-audit --disable-pip --require-hashes -r deploy/requirements.lock -r requirements.lock

bench: setup ## Measure, print a table and write bench/results.json.
	$(BIN)/python bench/run.py

growth: setup ## Measure the cost of calls with 10,000,000 entries, as a ratio to 10,000; writes bench/growth.json.
	$(BIN)/python bench/growth.py

# Everything here sets itself up: Python 3.11 or newer (with venv), make and git are enough.
.DEFAULT_GOAL := help
PYTHON ?= python3
bin := .venv/bin
protos := $(shell find protos/headwater -name '*.proto')
packages := pyproject.toml protos/pyproject.toml protos/setup.py protos/generate.py clients/python/pyproject.toml

.PHONY: help setup proto demo test gpu-test test-clients lint format types check clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name note; do \
		printf '  make %-14s %s\n' "$$name" "$$note"; done

setup: .venv/installed gen/made ## .venv with pinned dependencies, the stubs, and the commands headwater, headwater-loader, headwater-sampler

proto: ## the Python stubs in gen/, for mypy and for people, from protos/
	@rm -f gen/made && $(MAKE) --no-print-directory gen/made

demo: setup ## a loader and two samplers draw out/demo.png and say what it cost (FLAGS="--model-folder DIR" for your own)
	@env --block-signal=INT,TERM,HUP $(bin)/python scripts/demo $(FLAGS)

test: setup ## all tests but those that need Go or Node
	$(bin)/python -m pytest -m 'not clients' --numprocesses auto --maxprocesses 4 --dist loadfile

gpu-test: setup ## the tests that need a CUDA device
	$(bin)/python -m pytest -m gpu

test-clients: setup ## installs Go and Node packages, then tests the Go and TypeScript clients
	scripts/install-client-toolchains.sh
	HEADWATER_REQUIRE_CLIENTS=1 $(bin)/python -m pytest -m clients

lint: setup ## ruff and buf lint
	$(bin)/ruff check . && $(bin)/ruff format --check .
	cd protos && ../$(bin)/buf lint

format: setup ## ruff mends what it can
	$(bin)/ruff check --fix . && $(bin)/ruff format .

types: setup ## mypy --strict on services and the Python client
	$(bin)/mypy

check: lint types test test-clients ## what CI runs

clean: ## removes what make made, .venv excepted
	rm -rf gen out protos/build protos/*.egg-info *.egg-info clients/python/*.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/installed: constraints.txt scripts/setup.sh $(packages) $(protos)
	@PYTHON=$(PYTHON) scripts/setup.sh

gen/made: protos/generate.py $(protos) .venv/installed
	@$(bin)/python protos/generate.py gen && touch $@

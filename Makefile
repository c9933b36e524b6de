# The one door to every task. `make help` lists them.
.DEFAULT_GOAL := help
.PHONY: help install install-dev engines demo check test test-fast chart images images-smoke chaos bench clean

VENV := .venv
BIN := $(VENV)/bin
SOURCES := core gateway services cli tests benchmarks examples scripts

help:  ## list the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(VENV)/.installed  ## .venv with the CPU profile and the `asap` command
$(VENV)/.installed: pyproject.toml constraints.txt scripts/install.sh
	sh scripts/install.sh $(VENV) surprisal,hub,serve,trainer,evaluator
	@touch $@

install-dev: $(VENV)/.installed-dev
$(VENV)/.installed-dev: $(VENV)/.installed
	sh scripts/install.sh $(VENV) dev
	@touch $@

demo: install  ## prune the sample traces (no GPU, key or download) and show one
	@mkdir -p out
	$(BIN)/asap prune examples/triples.jsonl -o out/demo.jsonl \
	  --anchor extractive --scorer demo --max-tokens 512 --yes
	$(BIN)/asap show out/demo.jsonl --id marco-o1-033

check: install-dev  ## linters, types, layers, spelling
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $(SOURCES) docs README.md CHANGELOG.md CONTRIBUTING.md

engines: install-dev  ## the real Unsloth and vLLM (CPU builds) and the sandbox
	sh scripts/install_sandbox.sh
	sh scripts/install_unsloth.sh $(BIN)/python
	sh tests/engines/install.sh $(BIN)/python

test: engines  ## the whole suite, with the real vLLM and the real Unsloth
	$(BIN)/python -m pytest

test-fast: install-dev  ## the method, the flow and the rules of the tree: under two minutes
	$(BIN)/python -m pytest -m "not contract and not slow" tests/architecture tests/core tests/runtime

chart: install-dev  ## render, lint, validate and judge the Helm chart with every profile and toggle
	$(BIN)/python scripts/chart_docs.py --check
	$(BIN)/python -m pytest tests/deploy -q

images:  ## build the container images (VARIANT=gpu: for GPUs)
	sh scripts/images_smoke.sh --build

images-smoke:  ## build them, compose the system, prune, crash each service; needs root and docker (more: --train, --evaluate)
	sh scripts/images_smoke.sh

chaos: install-dev  ## kill workers, gateway, broker and database under a job of 2,000 items
	$(BIN)/python tests/faults/chaos.py

bench: install-dev  ## all benchmarks, each a table with ratios
	$(BIN)/python benchmarks/gestalt.py
	$(BIN)/python benchmarks/selection.py
	$(BIN)/python benchmarks/stage1.py
	$(BIN)/python benchmarks/codesplit.py
	$(BIN)/python benchmarks/scorer.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/live.py
	$(BIN)/python benchmarks/upload.py
	$(BIN)/python benchmarks/anchor.py
	$(BIN)/python benchmarks/trainer.py
	$(BIN)/python benchmarks/sandbox.py
	$(BIN)/python benchmarks/proxy.py

clean:  ## remove the environment and what runs leave behind
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Every target does its own set-up. `make help` lists them.
#
#   PYTHON=python3.12            the interpreter of the virtual environment (3.10 to 3.13; else one is looked for)
#   MINITRON_TORCH_INDEX=URL     where torch comes from; the default is a CPU build where there is no GPU
#   EXTRAS=dev,gpu               extras to install beside the package

SHELL := /bin/bash
VENV ?= .venv
EXTRAS ?= dev
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two ranks on two cores: more threads than that only get in each other's way.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help venv demo reproduce docs docs-links test coverage test-slow test-matrix lint format bench bench-check gpu-check dist lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

venv: $(INSTALLED)  ## the virtual environment, with the package in editable form

$(INSTALLED): pyproject.toml constraints.txt .ci/venv.sh
	@VENV=$(VENV) EXTRAS=$(EXTRAS) .ci/venv.sh
	@touch $@

demo: venv  ## the whole road on two ranks: teacher, pruning, distillation, evaluation, export (ARGS: key=value ...)
	@PATH=$(abspath $(BIN)):$$PATH NPROC_PER_NODE=2 launch/torchrun.sh run --config configs/quickstart.yaml $(ARGS)

reproduce: venv  ## the papers' claims, one after another, on two ranks: under three hours on two cores (ARGS: key=value ...)
	@set -e; for claim in $(filter-out %/cpu.yaml,$(wildcard configs/reproduce/*.yaml)); do echo "== $$claim"; \
		PATH=$(abspath $(BIN)):$$PATH NPROC_PER_NODE=2 launch/torchrun.sh reproduce --config $$claim $(ARGS); done

docs: venv  ## the documentation site, in build/docs; warnings are errors (ARGS: for sphinx-build)
	@PYTHONPATH=$(CURDIR) $(BIN)/python -m sphinx -b html -n -W --keep-going -q $(ARGS) docs build/docs
	@echo "make docs: build/docs/index.html"

docs-links: venv  ## whether the site's links to elsewhere still lead there; needs a network
	@PYTHONPATH=$(CURDIR) MINITRON_DOCS_NOTEBOOKS=off $(BIN)/python -m sphinx -b linkcheck -q docs build/docs-links

lint: venv  ## ruff, its formatter, and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --quiet --diff .
	@$(BIN)/mypy

# With an empty cache mypy takes a minute of one core: it runs beside the tests, and speaks where it finds something.
test: venv  ## ruff, then the tests that are not slow, two files at a time, and mypy beside them (ARGS: for pytest)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --quiet --diff .
	@said=$$(mktemp); $(BIN)/mypy >"$$said" 2>&1 & types=$$!; \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS); code=$$?; \
	wait $$types || { cat "$$said"; code=1; }; rm -f "$$said"; exit $$code

coverage: venv  ## the same tests under coverage, ranks included; fails below pyproject.toml's floor (ARGS: as for test)
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

test-slow: venv  ## the slow tests alone
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

test-matrix: venv  ## what touches megatron-core, under each supported pair: here, and with 0.19 where Python 3.12 or 3.13 is
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/unit tests/distributed $(ARGS)
	@.ci/matrix.sh make
	@.ci/matrix.sh full $(ARGS)

format: venv  ## sort imports and format
	@$(BIN)/ruff check --select I --fix .
	@$(BIN)/ruff format .

bench: venv  ## the benchmarks that run on any machine
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

bench-check: venv  ## whether the benchmarks' ratios still hold (ARGS="--only kd_step": some of them)
	@$(BIN)/python benchmarks/gate/ratios.py $(ARGS)

# With PYTHON=… by that interpreter as it is, so that a machine without a network needs no virtual environment.
gpu-check: $(if $(PYTHON),,venv)  ## what only a GPU can show, in 8 minutes; a dry run without one (PYTHON=python3.12: without make venv)
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(PYTHON),$(BIN)/python) benchmarks/gpu/check.py $(ARGS)

dist: venv  ## the sdist and the wheel, in dist/
	@$(BIN)/python -m build --outdir dist .

lock: venv  ## bring constraints.txt up to date with pyproject.toml, for Python 3.10 to 3.13
	@$(BIN)/pip install --quiet uv
	@$(BIN)/uv pip compile pyproject.toml --extra dev --extra resiliency --universal --python-version 3.10 --no-annotate --no-python-downloads --upgrade \
		--custom-compile-command "make lock" --output-file constraints.txt

clean:  ## everything that was built, but no run folder
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	@find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

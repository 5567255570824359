# make env   the environment, with the real engine       make check  what CI runs: lint, types, tests
# make demo  one long video under a page quota           make bench  speed and memory against stock vLLM
# make quality  accuracy against quota, an hour          make train  the model that it asks, two hours
# make quality-real  the same on a pretrained language model, beside its peers, within 90 minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PYTEST_ARGS ?=
# processes that run tests
TEST_PROCESSES ?= 2

.DEFAULT_GOAL := help
.PHONY: help env check lint fmt types test demo bench quality quality-real train build dist clean

help:
	@sed -n 's/^# //p' Makefile

env:
	@$(PYTHON) tools/env.py --venv $(VENV)

check: lint types test

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*.inl
	$(BIN)/hadolint Dockerfile

fmt: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/*.inl

types: env
	$(BIN)/mypy

test: env
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

demo: env
	$(BIN)/python -m benchmarks.demo

bench: env
	$(BIN)/python -m benchmarks.bench

quality: env
	$(BIN)/python -m benchmarks.quality.run

quality-real: env
	$(BIN)/python -m benchmarks.real.run
	$(BIN)/python -m benchmarks.real.peers --count 3 --sizes 2048

train: env
	$(BIN)/python -m benchmarks.quality.train

# a wheel of this machine's Python and platform, in dist/; it runs on any CPU of the platform
build: env
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

# what is published, in dist/: built, audited, and tried in an empty environment
dist: env
	$(BIN)/python tools/distribution.py

clean:
	rm -rf build dist *.egg-info vllm_budgetkv/_C*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

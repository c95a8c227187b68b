# Everything sets itself up: a virtual environment in .venv, the install, then the work.
# Needs only Python 3.11 or newer (choose one with PYTHON=python3.12).
PYTHON ?= python3
BIN := .venv/bin
CACHE ?= cache

.PHONY: demo test test-all lint check clean

$(BIN)/lymphfeat: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lymphfeat needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The main job on the built-in synthetic cohort. The end-to-end training is a taste: 9 steps, so that
# it ends in time; its figures mean little.
demo: $(BIN)/lymphfeat
	$(BIN)/lymphfeat extract
	$(BIN)/lymphfeat fit-head --agg topk --agg bnsigmoid --agg mean --seeds 2 --truth $(CACHE)/synthetic/truth.csv --out runs/demo --force
	$(BIN)/lymphfeat endtoend --epochs 3 --images-per-patient 5 --lr 1e-3 --truth $(CACHE)/synthetic/truth.csv --out models/demo --force
	@echo
	@echo "(The end-to-end training was 9 steps: a taste. lymphfeat endtoend does it in full.)"
	@echo
	@echo "Look at:  runs/demo/summary.png        the heads, with intervals, and their learning curves"
	@echo "          models/demo/curves.png       the end-to-end training"
	@echo "          models/demo/predictions.csv  a probability for every patient"
	@echo "          models/demo/submission.csv   the answer for the unlabelled patients"

# The same on every machine: a test names its precision, or runs in float32 and in bfloat16 whatever
# the processor has (tests/conftest.py).
test: $(BIN)/lymphfeat
	$(BIN)/python -m pytest -m "not slow"

# With the slow ones: torchrun, a browser, simulated studies.
test-all: $(BIN)/lymphfeat
	$(BIN)/python -m pytest

# What a commit must pass, beside the tests.
lint: $(BIN)/lymphfeat
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test-all

clean:
	rm -rf .venv runs models $(CACHE)/synthetic $(CACHE)/*.h5*

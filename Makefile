# Everything sets itself up: a virtual environment in .venv, the install, then the work.
# Needs only Python 3.11 or newer (choose one with PYTHON=python3.12).
PYTHON ?= python3
BIN := .venv/bin
CACHE ?= cache

.PHONY: demo test-fast test test-all lint check bench clean

$(BIN)/lymphfeat: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lymphfeat needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The main job on the built-in synthetic cohort.
demo: $(BIN)/lymphfeat
	$(BIN)/lymphfeat extract
	$(BIN)/lymphfeat fit-head --agg topk --agg bnsigmoid --agg mean --seeds 2 --truth $(CACHE)/synthetic/truth.csv --out runs/demo --force
	$(BIN)/lymphfeat endtoend --out models/demo --force
	@echo
	@echo "Look at:  runs/demo/summary.png        the heads, with intervals, and their learning curves"
	@echo "          models/demo/curves.png       the end-to-end training"
	@echo "          models/demo/predictions.csv  a probability for every patient"
	@echo "          models/demo/submission.csv   the answer for the unlabelled patients"

# The same on every machine: a test names its precision, or runs in float32 and in bfloat16 whatever
# the processor has (tests/conftest.py). Two processes; `worksteal` keeps a file's tests together.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# The quick ones: within a minute on two cores.
test-fast: $(BIN)/lymphfeat
	$(PYTEST) -m "not seconds and not slow"

# Trainings, killed processes, every example of the documentation.
test: $(BIN)/lymphfeat
	$(PYTEST) -m "not slow"

# torchrun, a browser, simulated studies.
test-all: $(BIN)/lymphfeat
	$(PYTEST)

# What a commit must pass besides the tests.
lint: $(BIN)/lymphfeat
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test-all

# Side by side with what one would take instead and with the limit, into docs/benchmarks.md: wants a
# quiet machine for an hour or two. Some rows: make bench ROWS="extraction store".
bench: $(BIN)/lymphfeat
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m benchmarks.bench $(if $(ROWS),--rows $(ROWS))

clean:
	rm -rf .venv runs models $(CACHE)/synthetic $(CACHE)/*.h5*

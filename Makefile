# The two commands: make train, make test. Both set up .venv by themselves; they need Python 3.11+ and make. So do make
# doc, which builds the documentation, and make report, which draws its figures of learning.
# make test-oldest checks the oldest versions that the package admits; on Linux it downloads torch with CUDA, several GB.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_ENV := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1

.PHONY: train test test-slow test-oldest doc report lint format type pytest clean

OLDEST := .venv-oldest

train: $(READY)
	# One thread: two are a fifth faster where nothing else runs, and many times slower where something does
	$(BIN)/python -m rl_zoo3.train --algo qvpo --env Pendulum-v1 -P --seed 0 --num-threads 1
	$(BIN)/python -m rl_zoo3.enjoy --algo qvpo --env Pendulum-v1 -f logs --no-render -n 4000

test: lint type pytest

# Two processes, the tests of a file in one of them, in the order of tests/conftest.py. One thread each: the models are tiny
pytest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow -s

doc: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Built docs/_build/html/index.html"

report: $(READY)
	$(BIN)/python benchmarks/learning/report.py

# RL Zoo is left out: the sb3-contrib that it needs asks for Stable-Baselines3 2.9.2
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest --ignore tests/zoo

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	PIP_CONSTRAINT=constraints-oldest.txt $(OLDEST)/bin/python -m pip install --quiet --editable ".[export,figures,mujoco,progress]" \
		pytest pytest-timeout scipy tensorboard pyyaml
	touch $@

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a minute or two"
	$(PYTHON) -m venv $(VENV)
	$(PIP_ENV) $(BIN)/python -m pip install --quiet --editable ".[tests]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache dist docs/_build

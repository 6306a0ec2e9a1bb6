# make demo      sets everything up, trains on a pool and grows it, ends it and starts it again, says what came of it
# make test      sets everything up and runs every check; make lint, types, imports, unit, integration: one of them alone
# make test-long the same tests with all their cases, and three times as many examples (twice as long)
# make check     what a change needs at least (SINCE=COMMIT)
# make simulate  whole pools on simulated time and links, each on a seed (SEEDS=200 SEED=1); says how to replay one
# make chaos     kills and stops processes and nodes of pools on a disk, cuts, fills, flips (SECONDS=300 SEED=1), bit for bit as without
# make bench     times every kernel beside its peers (seven minutes on two cores), in an environment of its own
# make bench-wire times look-ups and training steps in pools beside torch's rpc, a Ray actor and bare echoes; what plans predict by (25 minutes)
# make compare   models of equal FLOPs with seven kinds of blocks, on facts and text (hours; goes on where it was stopped; ARGS='--parts facts')
# make protos    generated code
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
READY := $(VENV)/.ready
# What the demo needs is less than what tests need, and sooner there; what compiles its kernels needs less still.
DEMO_READY := $(VENV)/.demo-ready
KERNELS_READY := $(VENV)/.kernels-ready
# What builds mempool: in place, so that pip makes no environment for it each time.
BUILD := hatchling editables
# Nothing is compiled to bytecode before it is imported: most of it never is. What is imported must be kept then.
unexport PYTHONDONTWRITEBYTECODE
PIP := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# What the demo counts its time from: setting up is part of it.
ifndef BEGAN
BEGAN := $(shell date +%s)
endif
export BEGAN
GPU_CODE := tests/unit/kernels/test_gpu_code.py
SOURCES := mempool examples tests protos
SINCE := HEAD
SEEDS ?= 200
SEED ?= 1
SECONDS ?= 300
ARGS ?=

.PHONY: help demo compile-kernels run-demo test test-long static check bench bench-wire compare lint types imports protos protos-check unit kernels gpu-code run-tests files integration setup clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,10s/^# //p' Makefile

setup: $(READY)

# Made anew when what is to be installed changes; otherwise nothing is installed again.
$(READY): $(KERNELS_READY)
	@$(BIN)/python $(PIP) --no-build-isolation -e '.[dev]'
	@touch $(DEMO_READY) $@

$(KERNELS_READY): pyproject.toml constraints.txt
	@$(call made,$(VENV),$(BUILD) torch numba numpy pydantic pyyaml)
	@touch $@

$(DEMO_READY): $(KERNELS_READY)
	@$(BIN)/python $(PIP) --no-build-isolation -e '.[server,examples]'
	@touch $@

, := ,
define made
echo "== setting up $(1) with $(PYTHON) (a few minutes, once)"; \
$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mempool needs Python 3.11 or newer; set PYTHON=")' && \
{ test -x $(1)/bin/pip || $(PYTHON) -m venv $(1); } && \
$(1)/bin/python $(PIP) $(2)
endef

# Kernels compile while the rest is installed and Ray starts; where they are compiled already that ends at once. No shell
# stands between make and these, so that who ends it ends them.
demo: $(KERNELS_READY)
	@exec $(MAKE) --no-print-directory -j 2 compile-kernels run-demo

# Without them the pool compiles what it needs.
compile-kernels: $(KERNELS_READY)
	-@exec env PYTHONPATH=. $(BIN)/python examples/compile_kernels.py -f cluster/local.yaml

run-demo: $(DEMO_READY)
	@echo "== demo: a pool of 2 shards on Ray, a trainer attached over gRPC, 10,000 facts, 2 -> 4 shards half way, off and on again"
	@exec env DEMO_BEGAN=$(BEGAN) $(BIN)/python examples/demo.py

# What is checked without running it needs one core, as does the start of the kernels' compiler.
test: $(READY)
	@$(MAKE) --no-print-directory -j 2 kernels static
	@$(MAKE) --no-print-directory run-tests

test-long: export MEMPOOL_TEST_LONG = 1
test-long: test

static: lint types imports protos-check gpu-code

lint: $(READY)
	@echo "== lint"
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)

types: $(READY)
	@echo "== types (mypy --strict)"
	@$(BIN)/mypy

imports: $(READY)
	@echo "== import contracts"
	@$(BIN)/lint-imports --no-cache

compare: $(DEMO_READY)
	@$(BIN)/python $(PIP) matplotlib
	@$(BIN)/python examples/compare_models.py $(ARGS)

protos: $(READY)
	@$(BIN)/python protos/generate.py

protos-check: $(READY)
	@echo "== protos: lint and drift"
	@$(BIN)/buf lint protos
	@$(BIN)/python protos/generate.py --check

unit: kernels gpu-code
	@$(MAKE) --no-print-directory run-tests

kernels: $(READY)
	@echo "== compiling the CPU kernels (once per version of them, kept on disk: no test shall wait for a compiler)"
	@$(BIN)/python -c "from mempool import kernels; kernels.warm_up()"

# One process, which needs no kernel of the CPU: beside their compiler.
gpu-code: $(READY)
	@echo "== compiling the GPU kernels for a GPU that need not be here"
	@$(BIN)/python -m pytest -q --durations 3 $(GPU_CODE)

# Those that start Ray and its nodes wait most of their time, one after the other; the others leave them the processors.
run-tests:
	@$(MAKE) --no-print-directory -j 2 -O files integration

# File by file in the order of tests/conftest.py, the long ones first.
files: $(READY)
	@echo "== tests"
	@OMP_WAIT_POLICY=passive nice $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 30 --ignore tests/integration --ignore $(GPU_CODE)

integration: $(READY)
	@echo "== tests that start Ray and its nodes"
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --durations 25 tests/integration

# What a change needs at least, in a minute or so: lint, types, imports, and the tests of the files that changed.
check: lint types imports
	@echo "== tests of what changed since $(SINCE)"
	@OMP_WAIT_POLICY=passive $(BIN)/python tests/changed.py $(SINCE) -n 2 --dist loadfile

# Exit 1 where a seed showed what may not be; the last line says seeds, violations, seeds a second.
.PHONY: simulate
simulate: kernels
	@$(BIN)/python -m tests.simulation.run --seeds $(SEEDS) --seed $(SEED)

# Exit 1 where anything was lost, or differs in a bit from what nobody disturbed. A third of the time is for one process,
# the rest for a pool on a Ray of its own: what happens, on its seed, is in tests/integration/faults.py.
.PHONY: chaos
chaos: $(READY)
	@$(BIN)/python -m tests.hostile.memory_kills --seconds $$(( $(SECONDS) / 3 )) --seed $(SEED)
	@$(BIN)/python -m tests.hostile.pool_kills --seconds $$(( 2 * $(SECONDS) / 3 )) --seed $(SEED) --changes

# The peers pin torch, so they live in an environment of their own. Times are worth something on an idle machine only.
bench: $(BENCH)/.ready
	@$(BENCH)/bin/mempool bench kernels --out tests/benchmarks/results --plot docs/kernels-cpu.png

bench-wire: $(BENCH)/.ready
	@OMP_WAIT_POLICY=passive $(BENCH)/bin/mempool bench serve --out tests/benchmarks/results --plot docs/lookups-cpu.png
	@OMP_WAIT_POLICY=passive $(BENCH)/bin/mempool bench train --out tests/benchmarks/results
	@OMP_WAIT_POLICY=passive $(BENCH)/bin/mempool bench plan --out tests/benchmarks/results

$(BENCH)/.ready: pyproject.toml constraints.txt
	@$(call made,$(BENCH),-e '.[server$(,)bench]')
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist out

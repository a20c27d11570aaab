# Everything happens in .venv, made on first use; a second run starts at once.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
DATA ?=
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := $(wildcard tract_fx passes tests examples benchmarks docs)
BENCHMARKS := $(wildcard benchmarks/bench_*.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo notebook test test-stock test-versions check lint types layout docs docs-serve bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

# One thread, so that it comes out alike on any number of cores; a net this small is as quick.
demo: .venv/.demo .venv/.dot ## train with and without TrAct, print the table, save plots and a report (DATA=folder of images, ARGS=options)
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py $(if $(DATA),--data "$(DATA)") $(ARGS)

notebook: .venv/.dev .venv/.dot ## execute examples/tutorial.ipynb and keep its outputs in it
	OMP_NUM_THREADS=1 $(BIN)/python tests/executed_notebook.py

# Single graphs run in both ONNX Runtimes that are here (LAST_RELEASE), whole training in the plain one's last release alone;
# tensors are handed over in both, whose interfaces differ.
STOCK_TESTS := tests/test_stock_runtime.py tests/test_stock_scaling.py
test: check .venv/.dot .venv/.chromium .venv/.stock ## the linters and types, then the tests (ARGS=pytest's options)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 LAST_RELEASE=.venv/stock/bin/python $(BIN)/pytest -n 2 \
		$(addprefix --ignore=,$(STOCK_TESTS)) $(ARGS)
	$(MAKE) test-stock ARGS=--quiet

test-stock: .venv/.stock ## those of graphs for any ONNX Runtime, in its last release
	OMP_NUM_THREADS=1 .venv/stock/bin/python -m pytest -n 2 -p no:cacheprovider $(STOCK_TESTS) tests/test_torch_tensors.py $(ARGS)

# Gigabytes, and an hour on two cores: the oldest and the newest torch, and two in between.
test-versions: .venv/.dev .venv/.dot ## the tests under other versions of PyTorch and Python (ARGS="--torch 2.11.0": that one alone)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/run_versions.py $(ARGS)

check: lint types ## ruff and mypy

lint: .venv/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: .venv/.dev layout
	$(BIN)/mypy build/typing/tract_fx $(filter-out tract_fx passes,$(SOURCES))

# passes/ is installed inside tract_fx/; what reads sources gets to see it there, through links.
layout:
	@rm -rf build/typing && mkdir -p build/typing/tract_fx
	@ln -s $(addprefix ../../../,$(wildcard tract_fx/*) passes) build/typing/tract_fx/

# --quiet would hide the warnings from --strict.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: .venv/.docs layout ## the site, in build/docs; a link that leads nowhere fails
	$(MKDOCS) build --strict

docs-serve: .venv/.docs layout ## the site on this machine, built again with each change
	$(MKDOCS) serve

# glibc's allocator alone changes a layer's time severalfold unless it keeps what it has.
bench: .venv/.dev ## the benchmarks, one after the other
	@test -n "$(BENCHMARKS)" || { echo "no benchmarks/bench_*.py here" >&2; exit 1; }
	set -e; for script in $(BENCHMARKS); do \
		MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456 \
		$(BIN)/python $$script $(ARGS); done

clean: ## remove the environment and everything built
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first and by itself: resolved along with the rest, it may come as a build for CUDA, gigabytes large.
.venv/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(PIP) $(shell grep '^torch==' constraints.txt)
	@touch $@

# Graphviz lays out the inspector's pictures, which are text without it; in Chromium tests look at the inspector's pages.
.venv/.dot: SYSTEM_PACKAGES := graphviz fonts-dejavu-core
.venv/.chromium: SYSTEM_PACKAGES := chromium
.venv/.dot .venv/.chromium: .venv/.%: | .venv/.torch
	@command -v $* >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		export DEBIAN_FRONTEND=noninteractive && { apt-get update -qq; \
		apt-get install -qq -y --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null; }; } || \
		echo "$* is missing and was not installed: for what needs it, install $(SYSTEM_PACKAGES)" >&2
	@if command -v $* >/dev/null; then touch $@; fi

# ONNX Runtime and ONNX Runtime Training share an import name: the former, alone, stands before the other packages here.
.venv/.stock: .venv/.dev
	$(BIN)/python -m venv .venv/stock
	.venv/stock/bin/python -m pip --disable-pip-version-check install --quiet --no-deps $(shell grep '^onnxruntime==' constraints.txt)
	.venv/stock/bin/python -c 'import sys, sysconfig as s; open(s.get_path("purelib") + "/others.pth", "w").write( \
		f"import site; site.addsitedir({sys.argv[1]!r})")' $$($(BIN)/python -c 'import sysconfig as s; print(s.get_path("purelib"))')
	@touch $@

# torch has brought setuptools along, so the build needs no environment of its own.
.venv/.demo .venv/.dev .venv/.docs: .venv/.%: .venv/.torch pyproject.toml
	$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

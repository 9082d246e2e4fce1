# `make gallery`, `make demo` and `make test` are all the set-up there is: they need Python >= 3.10, pip, make and a C++ compiler.
#
#   make demo        install into .venv and run `foveate compare` with its defaults; results in out/demo
#                    (continues a run that was interrupted)
#   make gallery     write the gallery of all mechanisms into out/gallery
#   make test        install with the development tools and run the fast tests
#   make test-slow   the longer checks
#   make lint        ruff (rules and format) and pyright
#   make bench       the benchmarks; results and plots into benchmarks/results (continues where it stopped)
#   make evidence    run every experiment of the catalogue whose code changed since its record, and keep what it finds
#   make sanitize    2,000 random requests to the C++ engine under the address and undefined-behaviour sanitizers, and as
#                    many under the thread sanitizer; FUZZ_SEED=<n> draws others
#   make sanitize-short  some hundreds of them, in less than three minutes
#   make clean       remove .venv, builds, caches and out/
#
# PIP_FLAGS is handed to pip, e.g. `make demo PIP_FLAGS="--extra-index-url <an index with a CPU build of torch>"`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo gallery test test-slow lint bench evidence sanitize sanitize-short clean

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# without --no-compile pip compiles every file of torch; Python compiles those that are used
INSTALL := $(PIP) install --no-compile -c constraints.txt $(PIP_FLAGS)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)

help:
	@sed -n 's/^#   //p' Makefile

# A virtual environment even where Debian's python3-venv package (which carries ensurepip) is absent: the pip that is
# there then installs one into it.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(VENV)/bin/python install $(PIP_FLAGS) pip; }

# torch comes first and alone, so that a CPU build offered to pip is taken before anything else asks for torch.
# The stamps hold the time of the last installation; a change of the metadata or of the C++ sources makes them stale.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) "torch==2.13.0"
	@touch $@

$(VENV)/.cli: $(SOURCES) $(VENV)/.torch
	$(INSTALL) -e ".[cli]"
	@touch $@

$(VENV)/.dev: $(SOURCES) $(VENV)/.torch
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.cli

demo: $(VENV)/.cli
	unfinished=$$(grep -qs '"complete": false' out/demo/results.json && echo --resume || true); \
	  $(BIN)/foveate compare --out out/demo $$unfinished

gallery: $(VENV)/.cli
	$(BIN)/foveate gallery build --out out/gallery

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check foveate tests benchmarks
	$(BIN)/pyright

bench: $(VENV)/.cli
	$(BIN)/python benchmarks/cpu_forward.py
	$(BIN)/foveate bench kernels --preset targets --resume --out benchmarks/results
	$(BIN)/python benchmarks/prefill_selectors.py --resume
	$(BIN)/python benchmarks/reader_recall.py
	$(BIN)/python benchmarks/linear_scan.py --rounds 1
	$(BIN)/python benchmarks/windows.py

evidence: $(VENV)/.cli
	$(BIN)/foveate reproduce --all --resume --out foveate/catalogue/evidence

# The native engine's C ABI under sanitizers: native/fuzz.cpp draws requests and compares with the definition. Its threads
# are the engine's own, because OpenMP's run-time library is not instrumented.
$(VENV)/.cmake: constraints.txt | $(BIN)/python
	$(INSTALL) cmake ninja
	@touch $@

SANITIZED := build/sanitize
SANITIZERS := address,undefined thread
FUZZ_SEED ?= 1
sanitize: ADDRESS_FUZZ := --cases 2000
sanitize: THREAD_FUZZ := --cases 2000 --threads-least 2 --work 2000000
sanitize-short: ADDRESS_FUZZ := --cases 300 --work 4000000
sanitize-short: THREAD_FUZZ := --cases 200 --threads-least 2 --work 1000000
sanitize sanitize-short: $(VENV)/.cmake
	for kind in $(SANITIZERS); do \
	  $(BIN)/cmake -S . -B $(SANITIZED)/$${kind%,*} -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DFOVEATE_FUZZ=ON -DFOVEATE_SANITIZE=$$kind; \
	  $(BIN)/cmake --build $(SANITIZED)/$${kind%,*}; \
	done
	$(SANITIZED)/thread/fuzz --seed $(FUZZ_SEED) $(THREAD_FUZZ) & thread=$$!; \
	  trap "kill $$thread 2> /dev/null || true" EXIT; \
	  $(SANITIZED)/address/fuzz --seed $(FUZZ_SEED) $(ADDRESS_FUZZ); \
	  wait $$thread

clean:
	rm -rf $(VENV) build out dist .pytest_cache .hypothesis .ruff_cache foveate/core/engines/*.so
	rm -rf .cmake .ninja_deps .ninja_log .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja \
	  cmake_install.cmake

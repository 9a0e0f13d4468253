# Every target makes the virtual environment it needs; PYTHON= chooses the interpreter (3.11+).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OLDEST := .venv-oldest
BENCH := .venv-bench
# How many processes share the tests; each has servers of its own.
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# The lower bound of the range that the extra `agents` names, as a pinned requirement.
OLDEST_AGENTS = import re, tomllib; \
	extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(re.sub(r">=([^,]+).*", r"==\1", extras["agents"][0]))

.PHONY: demo test check soak test-oldest bench clean

demo: $(VENV)/.stamp  ## tenants, shards and a real Runner, without a network
	$(RUN) -m shardgate.testing.demo

test: $(VENV)/.stamp  ## everything that this machine can run; the header names the databases
	$(RUN) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

check: $(VENV)/.stamp  ## lint, format, types, layers, the public API
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=src:tests $(VENV)/bin/mypy --explicit-package-bases tests/harness tests/conftest.py
	MYPYPATH=src:tests $(VENV)/bin/mypy --explicit-package-bases benchmarks
	MYPYPATH=src:deploy $(VENV)/bin/mypy --explicit-package-bases deploy/app
	$(VENV)/bin/lint-imports
	$(RUN) -m pytest -q tests/unit/test_public_api.py

soak: $(VENV)/.stamp  ## the long tests only
	$(RUN) -m pytest -m soak

test-oldest: $(OLDEST)/.stamp  ## the SDK tests on the oldest openai-agents that we support
	$(OLDEST)/bin/python -m pytest tests/agents -k sqlite

bench: $(BENCH)/.stamp  ## beside every peer, in 16 minutes; ARGS=--quick in three
	PYTHONPATH=tests $(BENCH)/bin/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) $(OLDEST) $(BENCH)

# pip knows dependency groups since 25.1. Quiet, except for what goes wrong.
%/.stamp: pyproject.toml
	$(PYTHON) -m venv $*
	echo '*' > $*/.gitignore
	$*/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$*/bin/python -m pip install --quiet --editable '.[agents,cli]' \
		--group $(if $(filter $(BENCH),$*),bench,dev) \
		$(if $(filter $(OLDEST),$*),"$$($*/bin/python -c '$(OLDEST_AGENTS)')")
	touch $@

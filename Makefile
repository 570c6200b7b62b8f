# Needs git, make and Python 3.11 or newer; everything else is installed into .venv.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
DEMO_FLAGS ?=
# pip says nothing for minutes; which language, clinometer chooses the same way.
INSTALLING := $(strip $(if $(filter zh%,$(firstword $(CLINOMETER_LANG) $(LC_ALL) $(LC_MESSAGES) $(LANG))),\
	正在把 PyTorch 等所需的一切装进 .venv：第一次要几分钟。,\
	Installing PyTorch and whatever else is needed into .venv: the first time takes some minutes.))

.PHONY: demo test compat pages browser check docs audit package bench soak coverage clean

demo: .venv/.installed
	$(BIN)/clinometer demo $(DEMO_FLAGS)

# Two processes; worksteal, because loadfile waits for ever where the last worker dies. A test has the time that
# pyproject.toml says; a worker that even then does not answer is ended with its stacks, and a run of 45 minutes too.
TEST_FLAGS := -n 2 --dist worksteal --run-limit 2700 -o faulthandler_timeout=660 -o faulthandler_exit_on_timeout=true

# A process for each of two cores; torch's own threads would only get into their way. Bytecode is written whatever
# the shell says: some two hundred processes import the package.
test: .venv/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not browser" $(TEST_FLAGS)

# What the pages print on other processors, and rounded in other ways: exactly what they show. `make test` tries
# two of these.
pages: .venv/.installed-dev
	$(BIN)/python -m tests.docs.stability

# The tests of what meets torch itself with another one: make compat TORCH=2.10.0 (or newest) PYTHON=python3.12
TORCH ?= newest
compat:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	.ci/compat $(TORCH) $(PYTHON)

# Through every page in Chromium; here a missing browser is a failure and not a skip.
browser: .venv/.installed-dev
	CLINOMETER_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -m "browser and not soak" --run-limit 1800 tests/view

coverage: .venv/.installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# Both languages into build/site, strictly: a page, a link or a place in a page that is missing is an error.
docs: .venv/.installed-dev
	$(BIN)/python docs/site.py

# Known vulnerabilities of what is installed; says so and passes where the advisories cannot be reached.
audit: .venv/.installed-dev
	$(BIN)/python -m tests.audit

# The sdist and the wheel, and the wheel used in an environment that has only what it declares.
package: .venv/.installed-dev
	$(BIN)/python .ci/package.py

# Peers are given by path: make bench NANOGPT=../nanoGPT TEXT=shakespeare.txt. ONLY=watching,training picks,
# QUICK=1 tries, PUBLISH=1 lets docs and READMEs speak of this machine.
bench: .venv/.installed-dev
	$(BIN)/python -m benchmarks $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(TEXT),--text $(TEXT)) \
		$(if $(ONLY),--only $(ONLY)) $(if $(QUICK),--quick) $(if $(PUBLISH),--publish)

# Hours. For an hour of the longest part: .venv/bin/python -m tests.gradients.soak --minutes 60
soak: .venv/.installed-dev
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml .ci/constraints.txt
	@echo "$(INSTALLING)"
	$(PIP_INSTALL) --editable .
	@$(BIN)/python .ci/torch_build.py
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

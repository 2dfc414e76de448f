# The newcomer's two commands are `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUIET_SERVICES := RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false

.PHONY: demo test test-cluster test-faults test-mutations bench check

$(VENV)/demo-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/test-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/demo-installed

demo: $(VENV)/demo-installed
	$(QUIET_SERVICES) $(BIN)/raystudy run experiments/demo.yaml
	@echo "raystudy, mlflow and ray in your shell: . $(BIN)/activate"

check: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Ray is as polite to other processes as it is by default: here that would be the tests that run beside it.
test: $(VENV)/test-installed check
	tests/install_system_packages.sh
	$(QUIET_SERVICES) OMP_NUM_THREADS=1 RAY_worker_niceness=0 $(BIN)/pytest -q -n 2 --dist loadfile -m "not cluster and not faults"

bench: $(VENV)/test-installed
	$(BIN)/python -m benchmarks

test-cluster: $(VENV)/test-installed
	tests/install_system_packages.sh
	$(QUIET_SERVICES) $(BIN)/pytest -q -raP -m cluster tests/cluster

test-faults: $(VENV)/test-installed
	$(QUIET_SERVICES) OMP_NUM_THREADS=1 $(BIN)/pytest -q -m faults tests

test-mutations: $(VENV)/test-installed
	$(BIN)/python -m tests.mutations

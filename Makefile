# make demo: the whole product on real input.   make test: the test suite without its slowest parts, make test-all: all
# of it.   make gpu: kernels on a GPU.   All but the last install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
PINS := packaging/cpu-constraints.txt packaging/cpu-overrides.txt

.PHONY: demo test test-all gpu lint install train clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python examples/demo_vlm/demo.py

test: install
	$(BIN)/python -m pytest -m "not slow"

test-all: install
	$(BIN)/python -m pytest

# What only a GPU can show, with a python3 that has torch for it: the kernels' tests there, then their speed beside
# whatever peers are installed (benchmarks/README.md). Under ten minutes; writes kernels.jsonl and kernels.md.
GPU_TESTS := $(patsubst %,tests/test_%.py,unpack repack gemm product experts op cuda sweep_kernel)
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -q $(GPU_TESTS)
	PYTHONPATH=. $(PYTHON) benchmarks/kernels.py --seconds 420 --out kernels.jsonl

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Everything for a machine without a GPU; see packaging/README.md. On a GPU machine: pip install vllm, pip install .
install: .venv/installed

.venv/installed: pyproject.toml packaging/cpu-requirements.txt packaging/vllm-metadata/pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$($(PYTHON) --version) is too old: Python 3.11 or later is needed (make PYTHON=python3.12 ...)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(UV) --override packaging/cpu-overrides.txt --constraint packaging/cpu-constraints.txt \
	  -r packaging/cpu-requirements.txt
	$(UV) --no-deps --no-build-isolation -e . packaging/vllm-metadata
	touch $@

# Two hours on two cores, minutes on a GPU; writes examples/demo_vlm/model anew.
train: install
	$(BIN)/python examples/demo_vlm/train.py examples/demo_vlm/model

clean:
	rm -rf .venv build dist *.egg-info demo-output

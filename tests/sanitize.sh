#!/bin/sh
# Builds the CPU library with ASan and UBSan into a copy of the package and runs the kernels' tests on it.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$root/setup.py" "$root/pyproject.toml" "$root/README.md" "$root/LICENSE" "$root/csrc" \
    "$root/fused_res" "$root/kernels" "$root/tests" "$copy"
cd "$copy"
rm -f fused_res/*.so
FUSED_RES_SANITIZE=1 FUSED_RES_BUILD_CUDA=0 "$PY" setup.py -q build_ext --inplace
compiler=${CXX:-c++}
# libstdc++ too: ASan must find the real __cxa_throw before torch loads one of its own
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    PYTHONPATH="$copy" "$PY" -m pytest -q -p no:cacheprovider tests/bn_act/test_cpu.py tests/res_block/test_cpu.py \
    tests/conv_bn_act/test_cpu.py tests/training_convolution/test_cpu.py tests/res_chain/test_cpu.py \
    -m "" -k "not compile and not modes and not billion and not opcheck and not gradgrad" "$@"

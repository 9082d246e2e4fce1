#!/usr/bin/env bash
# Builds the native engine with address and undefined-behaviour checks and runs its tests on that build.
#   bash native/sanitize.sh .venv/bin/python
# The package is copied beside the checked library, so the installed one stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-python3}")
room=build/sanitize
rm -rf "$room" && mkdir -p "$room"
cp -r foveate "$room/foveate"
common=(-std=gnu++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
  -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti -fvisibility=hidden -fPIC -Wno-psabi)
avx2=(-mavx2 -mfma -mf16c)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
defines=()
objects=()
compile() {  # source, flags...
  local source=$1 object="$room/$1.o"
  shift
  ${CXX:-g++} "${common[@]}" "$@" -c "native/$source" -o "$object"
  objects+=("$object")
}
compile kernel_portable.cpp
if [ "$(uname -m)" = x86_64 ]; then
  compile kernel_avx2.cpp "${avx2[@]}"
  compile kernel_avx512.cpp "${avx512[@]}"
  compile kernel_bf16dot_emulated.cpp "${avx512[@]}"
  compile kernel_avx512bf16.cpp "${avx512[@]}" -mavx512bf16
  defines=(-DFV_X86 -DFV_AVX512BF16)
fi
compile dispatch.cpp "${defines[@]}"
${CXX:-g++} -shared -fsanitize=address,undefined "${objects[@]}" -o "$room/foveate/core/engines/libfoveate_native.so"
cp -r tests "$room/tests"
cp pyproject.toml "$room/"
cd "$room"
# Python and torch leave memory to the end of the process; only errors in our code are of interest here.
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" PYTHONPATH=. \
  "$python" -m pytest tests/core/test_native.py -q -p no:cacheprovider -k "not fullgraph and not opcheck"

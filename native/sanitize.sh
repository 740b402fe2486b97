#!/bin/sh
# Builds the kernels and tests/driver.cpp with AddressSanitizer and UBSan, and runs the driver on
# every instruction set this machine has. Exit code 0: no finding. BUILD_DIR overrides the folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD_DIR:-$(mktemp -d)}
[ -n "${BUILD_DIR:-}" ] || trap 'rm -rf "$build"' EXIT
flags="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
cmake -S "$here" -B "$build" -DPRUNUS_PYTHON=OFF -DPRUNUS_DEV=ON -DCMAKE_BUILD_TYPE=None \
  -DCMAKE_CXX_FLAGS="$flags" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --target prunus_driver >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
rm -f "$build.log"
ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1 "$build/prunus_driver"

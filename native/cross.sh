#!/bin/sh
# Builds the kernels and the driver for 64-bit ARM with a cross compiler and runs the driver under
# qemu-user: correctness only, as emulated time says nothing. Skips with a reason, exit code 0,
# where either is missing. BUILD_DIR overrides the folder.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
compiler=${CROSS_CXX:-aarch64-linux-gnu-g++}
emulator=${QEMU:-qemu-aarch64}
for tool in "$compiler" "$emulator" cmake; do
  command -v "$tool" >/dev/null || {
    echo "skipped: no $tool (Debian: apt-get install g++-aarch64-linux-gnu qemu-user cmake)"
    exit 0
  }
done
build=${BUILD_DIR:-$(mktemp -d)}
[ -n "${BUILD_DIR:-}" ] || trap 'rm -rf "$build"' EXIT
cmake -S "$here" -B "$build" -DPRUNUS_PYTHON=OFF -DPRUNUS_DEV=ON -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$compiler" \
  -DCMAKE_EXE_LINKER_FLAGS=-static >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --target prunus_driver >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
rm -f "$build.log"
"$emulator" "$build/prunus_driver"

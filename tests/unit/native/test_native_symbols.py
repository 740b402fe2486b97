"""An ISA file must export its table and nothing else; above all no weak symbol."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "native"
FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    "amx_emulated": [],
}
FLAGS["avx512_vnni"] = [*FLAGS["avx512"], "-mavx512vbmi2", "-mavx512vnni"]
FLAGS["avx512_bf16"] = [*FLAGS["avx512_vnni"], "-mavx512bf16", "-DPRUNUS_HAS_BF16=1"]
FLAGS["amx"] = [*FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16", "-DPRUNUS_HAS_AMX=1"]
FOREIGN = {"memcpy", "memset", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_", "__tls_get_addr"}

needs_tools = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("nm")) or platform.machine() != "x86_64",
    reason="needs g++ and nm on x86-64",
)


@pytest.fixture(scope="module", params=["-O0", "-O3"])
def objects(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    found = {}
    for isa, flags in FLAGS.items():
        found[isa] = folder / f"{isa}.o"
        subprocess.run(
            ["g++", "-std=c++17", request.param, "-fPIC", "-Wall", "-Wextra", "-Werror",
             "-DPRUNUS_X86=1", *flags, f"-I{NATIVE / 'src'}", "-c",
             str(NATIVE / "src" / "isa" / f"{isa}.cpp"), "-o", str(found[isa])],
            check=True,
        )  # fmt: skip
    return found


def symbols(path):
    lines = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-2:] for line in lines.splitlines()]


@needs_tools
@pytest.mark.parametrize("isa", list(FLAGS))
def test_one_exported_symbol_and_no_weak_one(objects, isa):
    found = symbols(objects[isa])
    weak = [name for kind, name in found if kind in "WwVvu"]
    assert weak == []
    exported = [name for kind, name in found if kind.isupper() and kind != "U"]
    assert len(exported) == 1
    assert f"kernels_{isa}" in exported[0]
    undefined = {name for kind, name in found if kind == "U"}
    assert undefined <= FOREIGN


@needs_tools
def test_the_test_would_see_a_weak_symbol(tmp_path):
    source = tmp_path / "weak.cpp"
    source.write_text("#include <algorithm>\nint f(int a, int b) { return std::max(a, b); }\n")
    made = tmp_path / "weak.o"
    subprocess.run(["g++", "-O0", "-c", str(source), "-o", str(made)], check=True)
    assert any(kind in "WwVvu" for kind, _ in symbols(made))


def test_the_flags_are_those_of_the_build():
    text = (NATIVE / "CMakeLists.txt").read_text()
    for isa in ("avx2", "avx512", "avx512_vnni"):
        pattern = rf'isa/{isa}\.cpp PROPERTIES COMPILE_OPTIONS\s+"([^"]+)"'
        match = re.search(pattern, text)
        assert match is not None
        assert match.group(1).split(";") == FLAGS[isa]
    assert not re.search(r"-m(arch|tune)=native|-ffast-math|-Ofast", text)

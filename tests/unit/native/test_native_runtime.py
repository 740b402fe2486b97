"""Threads, forks and memory of the native module."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from prunus import kernels

native = pytest.importorskip("prunus._native")
pytestmark = pytest.mark.skipif(
    kernels.active_isa() == kernels.FALLBACK, reason="PRUNUS_NATIVE=0 asks for the fallback"
)


@pytest.fixture(autouse=True)
def _split_small_work():
    grain = native.grain()
    native.set_grain(1)
    yield
    native.set_grain(grain)


def problem(seed, m=200, k=150, n=70):
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((m, k)) < 0.8, 0, rng.standard_normal((m, k))).astype(np.float32)
    return kernels.pack(weight), rng.standard_normal((n, k)).astype(np.float32)


def test_several_python_threads_at_once():
    problems = [problem(seed, n=20 + 30 * seed) for seed in range(4)]
    wanted = [kernels.linear(blob, x) for blob, x in problems]
    failures = []

    def work(index):
        blob, x = problems[index % len(problems)]
        for i in range(150):
            got = kernels.linear(blob, x, threads=1 + i % 3)
            if not np.array_equal(got, wanted[index % len(problems)]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


FORK = """
import os, sys
sys.path.insert(0, {here!r})
import numpy as np
from prunus import kernels, _native
_native.set_grain(1)
rng = np.random.default_rng(0)
blob = kernels.pack(np.where(rng.random((300, 200)) < .8, 0, 1).astype(np.float32))
x = rng.standard_normal((90, 200)).astype(np.float32)
wanted = kernels.linear(blob, x, threads=3)
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        ok = all(np.array_equal(kernels.linear(blob, x, threads=3), wanted) for _ in range(50))
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if np.array_equal(kernels.linear(blob, x, threads=2), wanted) else 1)
        _, status = os.waitpid(grandchild, 0)
        os._exit(0 if ok and status == 0 else 1)
    children.append(pid)
assert np.array_equal(kernels.linear(blob, x, threads=3), wanted)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_makes_its_own_threads():
    code = FORK.format(here=os.path.dirname(__file__))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "ok"


def test_memory_stays_flat_over_thousands_of_calls():
    rng = np.random.default_rng(0)
    problems = [problem(i, m=10 + 37 * i, k=20 + 41 * i, n=1 + 23 * i) for i in range(8)]
    convolution = problem(0, m=20, k=90)[0]

    def calls(count):
        for i in range(count):
            blob, x = problems[int(rng.integers(len(problems)))]
            kernels.linear(blob, x, threads=1 + i % 3)
            kernels.matmul_planes(blob, x.T.copy(), threads=1 + i % 2)
            kernels.transpose(blob)
            geometry = kernels.Geometry(
                1 + i % 3, 10, (int(rng.integers(3, 30)), int(rng.integers(3, 60))), (3, 3)
            )
            image = np.ones((geometry.batch, 10, *geometry.size), np.float32)
            kernels.conv2d(convolution, image, geometry, threads=1 + i % 2)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    calls(1500)
    before = resident()
    calls(3000)
    assert resident() - before < 4 << 20


def test_grain_decides_from_when_threads_are_used():
    native.set_grain(0)
    assert native.grain() == 1
    blob, x = problem(1)
    wanted = kernels.linear(blob, x, threads=1)
    for grain in (1, 1 << 10, 1 << 40):
        native.set_grain(grain)
        np.testing.assert_array_equal(kernels.linear(blob, x, threads=4), wanted)


def test_more_threads_than_the_system_has_cores():
    blob, x = problem(2, m=700)
    np.testing.assert_array_equal(
        kernels.linear(blob, x, threads=100_000), kernels.linear(blob, x, threads=1)
    )


def test_the_table_lists_kernels_def():
    text = os.path.join(os.path.dirname(__file__), *[".."] * 3, "native", "src", "kernels.def")
    with open(text) as file:
        rows = [line for line in file if line.startswith("PRUNUS_KERNEL(")]
    assert len(rows) == len(kernels.table())
    for line, row in zip(rows, kernels.table(), strict=True):
        assert row["name"] in line
        assert f'"{row["layout"]}"' in line

"""Kernels on the threads of torch's OpenMP: the same numbers, with and without, also in forks."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from prunus import kernels
from prunus.kernels import loader, team

NATIVE = loader.load()
needs_team = pytest.mark.skipif(
    NATIVE is None or not sys.platform.startswith("linux") or not NATIVE.has_team(),
    reason="no OpenMP runtime is shared",
)


@pytest.fixture(autouse=True)
def small_shares():
    """Even small products are shared among threads."""
    if NATIVE is None:
        yield
        return
    before = NATIVE.grain()
    NATIVE.set_grain(1)
    yield
    NATIVE.set_grain(before)
    kernels.share_threads(Path(torch.__file__).parent)


def products(threads: int) -> list[np.ndarray]:
    g = np.random.default_rng(0)
    found = []
    for rows, columns, n in ((64, 96, 40), (257, 33, 7), (16, 16, 1)):
        w = g.standard_normal((rows, columns)).astype(np.float32)
        blob = kernels.pack(w * (g.random(w.shape) < 0.2))
        x = g.standard_normal((n, columns)).astype(np.float32)
        found.append(kernels.linear(blob, x, threads=threads))
    return found


def alike(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(NATIVE is None, reason="no native module")
def test_torch_computes_with_an_openmp_that_is_shared():
    assert "OpenMP" in torch.__config__.parallel_info()
    runtimes = [path.name for path in team.loaded()]
    assert NATIVE.has_team() == bool(team.entry(team.loaded(), Path(torch.__file__).parent))
    assert NATIVE.has_team() or runtimes == []


@needs_team
def test_team_and_own_threads_compute_the_same():
    for threads in (1, 2, 3, 8):
        shared = products(threads)
        NATIVE.lend_team(0)
        assert not NATIVE.has_team()
        assert alike(products(threads), shared)
        assert kernels.share_threads(Path(torch.__file__).parent)
        assert NATIVE.has_team()


@needs_team
def test_threads_of_python_share_one_team():
    wanted, wrong = products(2), []

    def work() -> None:
        for _ in range(30):
            torch.mm(torch.ones(64, 64), torch.ones(64, 64))
            if not alike(products(2), wanted):
                wrong.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_team
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_has_threads_of_its_own():
    wanted = products(2)
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if not NATIVE.has_team() and alike(products(2), wanted) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert NATIVE.has_team()


def test_only_one_runtime_or_torchs_own_counts(tmp_path):
    folder = tmp_path / "torch"
    own, other = folder / "lib" / "libgomp.so.1", tmp_path / "sklearn.libs" / "libgomp-1.so"
    assert team.entry((), folder) == 0
    assert team.entry((other, tmp_path / "libomp.so"), folder) == 0  # whose is torch's?
    assert team.entry((own, other), folder) == 0  # not loaded: nothing is, by asking
    runtimes = team.loaded()
    assert all(path.name.startswith(("libgomp", "libiomp5", "libomp")) for path in runtimes)
    if len(runtimes) == 1 and sys.platform.startswith("linux"):
        assert team.entry(runtimes, folder) > 0

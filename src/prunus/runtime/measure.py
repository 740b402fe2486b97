"""Interleaved timing, thread counts and the machine's name: what the planner decides by."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    least: int = 5,
    most: int = 200,
) -> dict[str, float]:
    """Median seconds of each callable, taken in turns so that noise hits all of them alike.

    Two rounds warm up; then rounds until `budget` seconds are spent, at least `least` of them.
    """
    for _ in range(2):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - started > budget:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Run torch and the kernels with this many threads, then restore."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

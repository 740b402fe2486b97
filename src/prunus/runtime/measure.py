"""Interleaved timing, thread counts and the machine's name: what the planner decides by."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

BURST = 3
"""Consecutive calls whose median counts once; one, if calls take more than 1/LONG of the budget."""
LONG = 50
CLOSE, LOUD, PATIENCE = 1.15, 1.3, 3.0
"""Measure up to PATIENCE times as long while the two fastest are within CLOSE of each other and
the middle burst of one of them takes LOUD times its best: the machine is busy with other things."""


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    least: int = 4,
    most: int = 80,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of each callable: the smallest median of its bursts of calls, in turns.

    What else runs on a machine only ever adds time. The median of a burst drops a single spike, the
    minimum over bursts finds the quietest moment, and turns give every callable the same chance of
    one; a median over everything would measure the load instead. Each round starts with another
    callable, so that none always follows the same one. One round warms up; then rounds until
    `budget` seconds are spent, at least `least` and at most `most` of them.
    """
    names = list(runs)
    slowest = max((_seconds(run, 1, clock)[0] for run in runs.values()), default=0.0)
    burst = 1 if slowest * LONG > budget else BURST
    bursts: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    for done in range(most):
        spent = clock() - started
        if done >= least and spent > budget and (spent > PATIENCE * budget or settled(bursts)):
            break
        first = done % max(len(names), 1)
        for name in names[first:] + names[:first]:
            bursts[name].append(statistics.median(_seconds(runs[name], burst, clock)))
    return {name: min(values) for name, values in bursts.items()}


def settled(bursts: Mapping[str, Sequence[float]]) -> bool:
    """Whether more rounds would hardly change who is fastest."""
    best = sorted((min(values), statistics.median(values)) for values in bursts.values())[:2]
    apart = len(best) < 2 or best[1][0] > CLOSE * best[0][0]
    return apart or all(middle <= LOUD * least for least, middle in best)


def _seconds(run: Callable[[], object], calls: int, clock: Callable[[], float]) -> list[float]:
    """Times of calls in a row."""
    times = []
    for _ in range(calls):
        begin = clock()
        run()
        times.append(clock() - begin)
    return times


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

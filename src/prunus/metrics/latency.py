"""Latency of functions in one process: interleaved rounds, medians and spread."""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from prunus.errors import ValueRangeError

_measurement = itertools.count()


@dataclass(frozen=True)
class Latency:
    """Seconds per call. `samples[i]` of all members of one `measurement` share a round."""

    median: float
    p10: float
    p90: float
    min: float
    repetitions: int
    samples: tuple[float, ...]
    measurement: int


@dataclass(frozen=True)
class Ratio:
    """Median of a ratio with its 10th and 90th percentile."""

    median: float
    low: float
    high: float


def latency(
    fn: Callable[[], object],
    *,
    repetitions: int = 30,
    warmup: int = 5,
    min_time: float = 200e-6,
) -> Latency:
    """Seconds per call of one function; to compare several, use compare()."""
    named = compare({"fn": fn}, repetitions=repetitions, warmup=warmup, min_time=min_time)
    return named["fn"]


def compare(
    fns: Mapping[str, Callable[[], object]],
    *,
    repetitions: int = 30,
    warmup: int = 5,
    min_time: float = 200e-6,
    seed: int = 0,
) -> dict[str, Latency]:
    """Seconds per call of each function, measured in turns so that drift meets all alike.

    Every round runs every function once, in an order shuffled by `seed`; a sample loops a function
    until it lasts about `min_time` seconds. Rounds in which the scheduler preempted the process
    are dropped if at least half of them remain. Garbage collection is off meanwhile.
    Raises ValueRangeError without functions or with repetitions below 1.
    """
    if not fns:
        raise ValueRangeError("compare: no functions; pass {name: function}")
    if repetitions < 1 or warmup < 0 or min_time < 0:
        raise ValueRangeError(
            f"compare: repetitions={repetitions}, warmup={warmup}, min_time={min_time}; "
            "allowed: repetitions >= 1, warmup >= 0, min_time >= 0"
        )
    order = list(fns)
    shuffle = random.Random(seed).shuffle
    taken: list[dict[str, float]] = []
    calm: list[bool] = []
    with _without_gc():
        loops = {name: _calibrate(fn, warmup, min_time) for name, fn in fns.items()}
        for _ in range(repetitions):
            shuffle(order)
            before = _preemptions()
            taken.append({name: _sample(fns[name], loops[name]) for name in order})
            calm.append(_preemptions() == before)
    if 2 * sum(calm) >= repetitions:
        taken = [sample for sample, undisturbed in zip(taken, calm, strict=True) if undisturbed]
    measurement = next(_measurement)
    return {name: _summary([t[name] for t in taken], repetitions, measurement) for name in fns}


def speedup(baseline: Latency, candidate: Latency) -> Ratio:
    """How many times faster the candidate is: baseline / candidate, paired by round.

    Raises ValueRangeError if the two were not measured by one compare().
    """
    if baseline.measurement != candidate.measurement:
        raise ValueRangeError(
            "speedup: the two latencies come from different measurements, so that their samples "
            "cannot be paired; measure both in one compare({...})"
        )
    pairs = zip(baseline.samples, candidate.samples, strict=True)
    ratios = [slow / fast for slow, fast in pairs]
    low, high = _spread(ratios)
    return Ratio(median(ratios), low, high)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Pin torch to `count` threads, then restore the number that was set."""
    if count < 1:
        raise ValueRangeError(f"threads: count is {count}; it must be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _calibrate(fn: Callable[[], object], warmup: int, min_time: float) -> int:
    """Warm up, then find how many calls make a sample of about min_time seconds."""
    for _ in range(warmup):
        fn()
    loops = 1
    while True:
        started = time.perf_counter()
        for _ in range(loops):
            fn()
        elapsed = time.perf_counter() - started
        if elapsed >= min_time:
            return loops
        # At most tenfold at a time: a clock tick of zero must not make the loop endless.
        loops = max(loops + 1, min(loops * 10, int(loops * 1.2 * min_time / max(elapsed, 1e-9))))


def _sample(fn: Callable[[], object], loops: int) -> float:
    """Seconds per call over `loops` calls."""
    started = time.perf_counter_ns()
    for _ in range(loops):
        fn()
    return (time.perf_counter_ns() - started) / loops * 1e-9


def _usage() -> Callable[[], int]:
    try:
        import resource
    except ImportError:  # Windows has no getrusage; nothing is dropped there
        return lambda: 0
    usage: Any = resource.getrusage
    who: int = resource.RUSAGE_SELF
    return lambda: usage(who).ru_nivcsw


_preemptions = _usage()


def _summary(samples: list[float], repetitions: int, measurement: int) -> Latency:
    low, high = _spread(samples)
    return Latency(
        median=median(samples),
        p10=low,
        p90=high,
        min=min(samples),
        repetitions=repetitions,
        samples=tuple(samples),
        measurement=measurement,
    )


def _spread(values: list[float]) -> tuple[float, float]:
    """10th and 90th percentile, interpolated linearly."""
    if len(values) == 1:
        return values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]

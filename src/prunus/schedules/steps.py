"""Schedules as pure functions of the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from prunus.arguments import check_sparsity, check_steps
from prunus.core import Schedule
from prunus.errors import ValueRangeError


def one_shot(sparsity: float, step: int = 0) -> Schedule:
    """Reach `sparsity` in one update, at `step`."""
    check_sparsity(sparsity)
    check_steps(step=step)
    return Schedule(
        f"one_shot({sparsity:g}, step={step})",
        lambda now: sparsity if now == step else None,
        final=sparsity,
        last=step,
    )


def constant(sparsity: float, every: int, stop: int) -> Schedule:
    """Update at 0, every, 2 every, ... before `stop`, always at the same sparsity.

    What dynamic sparse training runs on: the first update sets the mask, later ones move it.
    Raises ValueRangeError unless every >= 1 and stop >= 1.
    """
    check_sparsity(sparsity)
    check_steps(every=every, stop=stop)
    if every < 1 or stop < 1:
        raise ValueRangeError(f"every and stop are at least 1, got every={every}, stop={stop}")
    return Schedule(
        f"constant({sparsity:g}, every={every}, stop={stop})",
        lambda now: sparsity if now < stop and now % every == 0 else None,
        final=sparsity,
        last=(stop - 1) // every * every,
    )


def iterative(sparsity: float, rounds: int, every: int, begin: int = 0) -> Schedule:
    """Remove the same fraction of what is left, `rounds` times: s_i = 1 - (1 - s)^(i / rounds).

    Round i = 1 ... rounds happens at step begin + (i - 1) every.
    Source: Han, Pool, Tran, Dally 2015, arXiv 1506.02626; Frankle & Carbin 2019, arXiv 1803.03635.
    """
    check_sparsity(sparsity)
    check_steps(rounds=rounds, every=every, begin=begin)
    if rounds < 1 or every < 1:
        raise ValueRangeError(f"rounds and every are at least 1, got {rounds} and {every}")

    def at(now: int) -> float | None:
        done, rest = divmod(now - begin, every)
        if now < begin or rest or done >= rounds:
            return None
        return sparsity if done == rounds - 1 else 1 - (1 - sparsity) ** ((done + 1) / rounds)

    name = f"iterative({sparsity:g}, rounds={rounds}, every={every}, begin={begin})"
    return Schedule(name, at, final=sparsity, last=begin + (rounds - 1) * every, gradual=rounds > 1)


def linear(sparsity: float, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """Rise by equal amounts: s_t = s_i + (s_f - s_i) x, x = (t - begin) / (end - begin)."""
    return _ramp("linear", lambda x: x, sparsity, begin, end, every, initial)


def cubic(sparsity: float, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """Rise fast, then ever slower: s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3.

    Updates at begin, begin + every, ... and at `end`, where s_f is reached exactly.
    Source: Zhu & Gupta 2017, arXiv 1710.01878, eq. 1.
    """
    return _ramp("cubic", lambda x: 1 - (1 - x) ** 3, sparsity, begin, end, every, initial)


def exponential(
    sparsity: float, begin: int, end: int, every: int = 1, initial: float = 0.0
) -> Schedule:
    """Keep a constant factor from update to update: 1 - s_t = (1 - s_i) ((1 - s_f) / (1 - s_i))^x.

    x = (t - begin) / (end - begin); the ramp of `iterative` by steps. At s_f = 1 nothing is kept
    from the second update on. Source: e.g. de Jorge, Sanyal, Behl, Torr, Rogez, Dokania 2021,
    arXiv 2006.09081, eq. 8 (there over the rounds of pruning at initialisation).
    """
    check_sparsity(sparsity)
    check_sparsity(initial, "initial")
    if initial == 1.0:
        raise ValueRangeError("an exponential ramp keeps something to start from: initial < 1")
    kept = (1.0 - sparsity) / (1.0 - initial)

    def progress(x: float) -> float:
        return 0.0 if sparsity == initial else (1.0 - kept**x) / (1.0 - kept)

    return _ramp("exponential", progress, sparsity, begin, end, every, initial)


def cosine(sparsity: float, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """Rise slowly, fast, slowly: s_t = s_f + (s_i - s_f) (1 + cos(pi x)) / 2, x from begin to end.

    The half cosine of learning rates, Loshchilov & Hutter 2017, arXiv 1608.03983.
    """

    def progress(x: float) -> float:
        return (1.0 - math.cos(math.pi * x)) / 2

    return _ramp("cosine", progress, sparsity, begin, end, every, initial)


def _ramp(
    kind: str,
    progress: Callable[[float], float],
    sparsity: float,
    begin: int,
    end: int,
    every: int,
    initial: float,
) -> Schedule:
    check_sparsity(sparsity)
    check_sparsity(initial, "initial")
    check_steps(begin=begin, end=end, every=every)
    if end < begin or every < 1:
        raise ValueRangeError(
            f"a ramp needs begin <= end and every >= 1, got begin={begin}, end={end}, every={every}"
        )

    def at(now: int) -> float | None:
        if now == end:
            return sparsity
        if not begin <= now < end or (now - begin) % every:
            return None
        return initial + (sparsity - initial) * progress((now - begin) / (end - begin))

    name = f"{kind}({sparsity:g}, begin={begin}, end={end}, every={every})"
    return Schedule(name, at, final=sparsity, last=end, gradual=True)

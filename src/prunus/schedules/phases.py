"""Schedules with dense phases, with thresholds, and one that follows the validation loss."""

from __future__ import annotations

from prunus.arguments import check_sparsity
from prunus.core import Schedule
from prunus.errors import ValueRangeError


def cyclic(sparsity: float, sparse: int, dense: int, cycles: int, begin: int = 0) -> Schedule:
    """Compress and decompress in turn: `sparse` steps at `sparsity`, `dense` steps at 0, and again.

    Starts at step `begin` with a sparse phase and ends in one, `cycles` in all, so that the mask of
    step begin + (cycles - 1) (sparse + dense) is final. Compose it with revive=True.
    Source: Peste, Iofinova, Vladu, Alistarh 2021, arXiv 2106.12379 (AC/DC), algorithm 1; the phases
    of iterative hard thresholding (Jin, Yuan, Feng, Yan 2016, arXiv 1607.05423) are the same.
    """
    check_sparsity(sparsity)
    if min(sparse, dense, cycles) < 1 or begin < 0:
        raise ValueRangeError(
            f"phases and cycles are at least 1 and begin at least 0, got sparse={sparse}, "
            f"dense={dense}, cycles={cycles}, begin={begin}"
        )
    last = begin + (cycles - 1) * (sparse + dense)

    def at(now: int) -> float | None:
        if not begin <= now <= last:
            return None
        place = (now - begin) % (sparse + dense)
        return {0: sparsity, sparse: 0.0}.get(place)

    name = f"cyclic({sparsity:g}, sparse={sparse}, dense={dense}, cycles={cycles}, begin={begin})"
    falls = cycles > 1
    return Schedule(name, at, final=sparsity, last=last, gradual=falls, falls=falls)


def dense_sparse_dense(sparsity: float, begin: int, end: int) -> Schedule:
    """Train dense, from step `begin` sparse, and from step `end` dense again: a regularisation.

    What returns starts from zero; the network ends dense. Compose it with revive=True.
    Source: Han, Pool, Narang, Mao et al. 2017, arXiv 1607.04381.
    """
    check_sparsity(sparsity)
    if not 0 <= begin < end:
        raise ValueRangeError(f"the sparse phase needs 0 <= begin < end, got {begin} and {end}")
    return Schedule(
        f"dense_sparse_dense({sparsity:g}, begin={begin}, end={end})",
        lambda now: {begin: sparsity, end: 0.0}.get(now),
        final=0.0,
        last=end,
        gradual=True,
        falls=True,
    )


def threshold_ramp(begin: int, turn: int, end: int, every: int = 100) -> Schedule:
    """Let a threshold rise from `begin`, 1.5 times as fast from `turn` on, until `end`.

    at(step) is the fraction of the final threshold: combine it with `allocations.threshold(q)`,
    where the paper takes for q the 90th percentile of |w| of a dense network. With slopes theta and
    phi = 1.5 theta, theta = 2 q / (2 (turn - begin) + 3 (end - turn)) per step.
    Source: Narang, Elsen, Diamos, Sengupta 2017, arXiv 1704.05119, algorithm 1 and eq. 1. Differs:
    reaches q exactly at `end`, where the paper's counts of steps start at 1 and overshoot.
    """
    if not 0 <= begin <= turn <= end or begin == end or every < 1:
        raise ValueRangeError(
            f"a threshold rises over 0 <= begin <= turn <= end, begin < end, every >= 1, got "
            f"begin={begin}, turn={turn}, end={end}, every={every}"
        )
    slope = 2.0 / (2 * (turn - begin) + 3 * (end - turn))

    def at(now: int) -> float | None:
        if now == end:
            return 1.0
        if not begin <= now < end or (now - begin) % every:
            return None
        return slope * (min(now, turn) - begin + 1.5 * max(0, now - turn))

    name = f"threshold_ramp(begin={begin}, turn={turn}, end={end}, every={every})"
    return Schedule(name, at, final=1.0, last=end, gradual=True, measure="threshold")


def adaptive(
    sparsity: float,
    begin: int,
    end: int,
    every: int = 100,
    *,
    strength: float = 2 / 3,
    sensitivity: float = 2.0,
) -> Schedule:
    """Prune more the more the network overfits: each update removes a share lambda of what is left.

    lambda = strength (1 - 1 / (1 + sensitivity GL)), GL = 100 (E_va / min E_va - 1), the loss of
    generalisation in percent, from the validation loss E_va at each update. While E_va is at its
    lowest nothing is removed; never beyond `sparsity`. Attach with validate=.
    Source: Prechelt 1997, Neurocomputing 16 (lprune); its constants are quoted from memory, the
    text was not at hand. Differs: lambda is the fraction removed of what is kept, where the paper
    removes the connections whose test statistic lies below lambda times the mean of all.
    """
    check_sparsity(sparsity)
    check_sparsity(strength, "strength")
    if not 0 <= begin <= end or every < 1 or sensitivity < 0:
        raise ValueRangeError(
            f"an adaptive schedule needs 0 <= begin <= end, every >= 1 and sensitivity >= 0, got "
            f"begin={begin}, end={end}, every={every}, sensitivity={sensitivity}"
        )

    def adapt(reached: float, loss: float, best: float) -> float:
        overfit = 100.0 * (loss / best - 1.0) if best > 0 else 0.0
        share = strength * (1.0 - 1.0 / (1.0 + sensitivity * max(0.0, overfit)))
        return max(reached, min(sparsity, 1.0 - (1.0 - reached) * (1.0 - share)))

    def at(now: int) -> float | None:
        due = now == end or (begin <= now < end and (now - begin) % every == 0)
        return sparsity if due else None

    name = f"adaptive({sparsity:g}, begin={begin}, end={end}, every={every})"
    return Schedule(name, at, final=sparsity, last=end, gradual=True, adapt=adapt)

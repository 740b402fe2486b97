"""Checks of arguments that many parts take: a sparsity, steps, shares and positive numbers."""

from __future__ import annotations

import math
from numbers import Real

from prunus.errors import ValueRangeError


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """Return `sparsity` if it lies in [0, 1]; raise ValueRangeError if not (NaN included)."""
    if not isinstance(sparsity, Real) or isinstance(sparsity, bool):
        raise ValueRangeError(f"{name} is a number between 0 and 1, got {sparsity!r}")
    if not 0.0 <= sparsity <= 1.0:
        raise ValueRangeError(
            f"{name} is the fraction removed and lies between 0 and 1, got {sparsity!r}"
            + (f"; did you mean {sparsity / 100:g}?" if 2 <= sparsity <= 100 else "")
        )
    return float(sparsity)


def check_steps(**steps: int) -> None:
    """Raise ValueRangeError unless each is a whole number of optimizer steps, 0 or more."""
    for name, value in steps.items():
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (real and value >= 0 and value != float("inf") and value == int(value)):
            raise ValueRangeError(f"{name} counts optimizer steps and cannot be {value!r}")


def check_share(**shares: float) -> None:
    """Raise ValueRangeError unless each is a number between 0 and 1 (NaN is none)."""
    for name, value in shares.items():
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not (real and 0.0 <= value <= 1.0):
            raise ValueRangeError(f"{name} is a share between 0 and 1, got {value!r}")


def check_positive(zero: bool = False, /, **values: float) -> None:
    """Raise ValueRangeError unless each is a finite number above 0, or 0 where `zero` allows it."""
    for name, value in values.items():
        real = isinstance(value, Real) and not isinstance(value, bool)
        if not (real and math.isfinite(value) and (value > 0 or (zero and value == 0))):
            raise ValueRangeError(f"{name} is a number {'>=' if zero else '>'} 0, got {value!r}")

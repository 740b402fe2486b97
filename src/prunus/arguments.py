"""Checks of the two arguments that nearly every part takes: a sparsity, and steps."""

from __future__ import annotations

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

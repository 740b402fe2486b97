"""Which outputs of a weight share their columns, from its zeros alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunus.kernels.vectors import HEIGHTS, MAX_COLUMNS

FULL = 0.9
"""Share of non-zeros in stored vectors from which a height counts as the weight's structure."""
HALF = 0.45
"""Below this share of non-zeros, multiplying the zeros in between cannot pay; 2:4 is above it."""


@dataclass(frozen=True)
class Grouping:
    """`height` outputs share their columns; `full` is the share of non-zeros among stored values.

    order: packed row i is output order[i]; None: the outputs in their order.
    """

    height: int
    full: float
    order: np.ndarray | None = None


def fullness(mask: np.ndarray) -> dict[int, float]:
    """{height: share of kept weights in the vectors of a mask [rows, cols] that hold one}."""
    kept, found, held, below = int(np.count_nonzero(mask)), {}, mask, 1
    for height in HEIGHTS:
        step = height // below
        held = np.pad(held, ((0, -len(held) % step), (0, 0)))
        held = np.asarray(held.reshape(len(held) // step, step, held.shape[1]).any(axis=1))
        found[height] = kept / max(1, int(np.count_nonzero(held)) * height)
        below = height
    return found


def alike(mask: np.ndarray) -> np.ndarray:
    """The outputs in an order that puts those with the same columns next to each other."""
    bits = np.packbits(mask, axis=1)
    _, first, which = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    return np.argsort(first[which.reshape(-1)], kind="stable")


def grouping(weight: np.ndarray) -> Grouping | None:
    """The groups that a weight [rows, ...] is worth packing in; None: single weights.

    The largest height whose vectors are FULL, in the order of the outputs or with equal rows moved
    together; else the largest height at HALF or more, as for 2:4 or little sparsity.
    """
    mask = weight.reshape(weight.shape[0], -1) != 0 if weight.size else np.zeros((0, 0), bool)
    if not mask.any() or mask.shape[1] > MAX_COLUMNS:
        return None
    shares = fullness(mask)
    best = _largest(shares, FULL)
    if best is not None:
        return Grouping(best, shares[best])
    order = alike(mask)
    moved = fullness(mask[order])
    best = _largest(moved, FULL)
    if best is not None:
        return Grouping(best, moved[best], order)
    best = _largest(shares, HALF)
    return None if best is None else Grouping(best, shares[best])


def _largest(shares: dict[int, float], least: float) -> int | None:
    """The largest height with at least this share."""
    return max((height for height, share in shares.items() if share >= least), default=None)

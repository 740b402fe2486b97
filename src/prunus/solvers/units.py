"""Where the units of a structure lie, and which of them have to go first."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.core import Structure
from prunus.select import keep_top


def positions(structure: Structure, shape: tuple[int, ...]) -> Tensor | None:
    """Return the flat index of every unit, [rows, units]; None if units are not single weights."""
    rows, units, size = structure.layout(shape)
    if size != 1 or rows * units == 0:
        return None
    index = torch.arange(rows * units, dtype=torch.float64).reshape(shape)
    return structure.reduce(index).long()


def chosen(scores: Tensor, k: int, structure: Structure, shape: tuple[int, ...]) -> Tensor:
    """Return the mask that keeps the k units of each row with the highest scores."""
    return structure.expand(keep_top(scores, k), shape)


def trivial(mask: Tensor) -> bool:
    """Tell whether nothing goes or nothing stays, so that there is nothing to solve."""
    return not mask.numel() or bool(mask.all()) or not bool(mask.any())


def forced_off(scores: Tensor, k: int) -> Tensor:
    """Return bool [rows, units]: what scores -inf, but never more than has to go."""
    off = scores == float("-inf")
    return off & (off.cumsum(1) <= scores.shape[1] - k)


def scattered(values: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Put values of units, [rows, units], to their places in a weight of that shape."""
    flat = torch.empty(index.numel(), dtype=values.dtype, device=values.device)
    flat[index.flatten()] = values.flatten()
    return flat.reshape(shape)

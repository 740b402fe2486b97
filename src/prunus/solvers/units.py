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


def columns_of(structure: Structure, shape: tuple[int, ...]) -> Tensor | None:
    """Return the columns of each unit, [units, columns of a unit]; None if units are not columns.

    Columns: of the weight as [shape[0], the rest], as whole inputs of a layer are. Found by
    expanding the binary digits of the units' numbers.
    """
    rows, units, size = structure.layout(shape)
    outputs = shape[0]
    if rows != 1 or outputs == 0 or units == 0 or size % outputs:
        return None
    number = torch.zeros(shape, dtype=torch.long)
    for digit in range(max(1, (units - 1).bit_length())):
        on = (torch.arange(units) >> digit & 1).bool()[None]
        number += structure.expand(on, shape).long() << digit
    flat = number.reshape(outputs, -1)
    if not bool((flat == flat[:1]).all()):
        return None
    return flat[0].argsort(stable=True).reshape(units, size // outputs)


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

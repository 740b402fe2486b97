"""Structure that the places of stored weights show by themselves, beyond coincidence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunus.training.pattern import Pattern

_LEAST = 64
"""Stored and missing weights below which a structure may be chance."""

_SIDES = (16, 8, 4, 2)
_GROUPS = (4, 8, 16, 32, 2)


def evident(pattern: Pattern, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """Return (what the places come in, the call of `structures` that keeps it), or None.

    Seen are blocks of sides 1 to 16 (powers of two), whole outputs, whole inputs, n:m and a
    constant fan-in. Where `_LEAST` weights or more are stored and as many missing, random places
    have none of them but for odds of about 2^-30.
    """
    size = math.prod(pattern.shape)
    if min(pattern.nnz, size - pattern.nnz) < _LEAST or min(pattern.shape) < 2:
        return None
    counts = pattern.offsets.long().diff()
    places = pattern.places()
    if bool(((counts == 0) | (counts == pattern.shape[1])).all()):
        return "whole outputs", "structures.channel(0)"
    area = math.prod(shape[2:])
    used = torch.bincount(pattern.wide_columns().long(), minlength=pattern.shape[1])
    if bool(((used == 0) | (used == pattern.shape[0])).all()):
        whole = used.reshape(-1, area) > 0
        if bool((whole.any(1) == whole.all(1)).all()):
            return "whole inputs", "structures.channel(1)"
    height, width = _height(pattern, places, counts), _width(pattern, places)
    if height * width > 1:
        return f"blocks of {height} x {width}", f"structures.block({height}, {width})"
    found = _ratio(pattern, shape)
    if found is not None:
        return f"{found[0]} of {found[1]}", f"structures.n_of_m({found[0]}, {found[1]})"
    if len(counts) >= 32 and bool((counts == counts[0]).all()):
        return f"a constant fan-in of {int(counts[0])}", "structures.fan_in()"
    return None


def _whole(tiles: Tensor, size: int) -> bool:
    """Whether every tile that has a weight has all of them; tiles: ascending."""
    distinct = 1 + int((tiles[1:] != tiles[:-1]).count_nonzero())
    return distinct * size == len(tiles)


def _width(pattern: Pattern, places: Tensor) -> int:
    fits = (w for w in _SIDES if pattern.shape[1] % w == 0)
    return next((w for w in fits if _whole(places // w, w)), 1)


def _height(pattern: Pattern, places: Tensor, counts: Tensor) -> int:
    """The height of blocks; sorts only where groups of rows have equal counts."""
    rows, columns = pattern.shape
    for height in _SIDES:
        if rows % height:
            continue
        groups = counts.reshape(-1, height)
        if bool((groups == groups[:, :1]).all()):
            row = places.div(columns, rounding_mode="floor")
            tiles = row.div(height, rounding_mode="floor") * columns + places % columns
            if _whole(tiles.sort().values, height):
                return height
    return 1


def _ratio(pattern: Pattern, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The n and m of groups along the inputs that all hold n of m."""
    area, inputs = math.prod(shape[2:]), shape[1]
    column = pattern.wide_columns().long()
    channel = column.div(area, rounding_mode="floor")
    line = pattern.rows() * area + column % area
    for m in _GROUPS:
        groups = math.prod(pattern.shape) // m
        if inputs % m or pattern.nnz % groups or groups < 32:
            continue
        held = torch.bincount(line * (inputs // m) + channel // m, minlength=groups)
        if bool((held == held[0]).all()):
            return int(held[0]), m
    return None

"""Packed: one tensor in one storage format, as named NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from prunus.errors import FormatError
from prunus.formats.dtypes import nonzero_mask

Shape = tuple[int, ...]
Parts = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor of `shape` and logical `dtype`, stored as the named arrays of `format`."""

    format: str
    shape: Shape
    dtype: str
    parts: Parts

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def nonzeros(self) -> int:
        """Stored values that are not zero."""
        return int(np.count_nonzero(nonzero_mask(self.parts["values"], self.dtype)))


@dataclass(frozen=True)
class Format:
    """One storage format: exact size, and how to encode, check and decode it.

    size: (shape, nonzeros, value bits) -> bytes, the least possible where it depends on the places.
    encode: (contiguous array, keep mask) -> parts; `values` holds the stored values.
    check: (parts, shape, storage dtype) -> None; FormatError unless decode is safe.
    decode: (parts, shape) -> new array.
    size_of: (shape, keep mask, value bits) -> bytes, where they depend on the places.
    """

    name: str
    size: Callable[[Shape, int, int], int]
    encode: Callable[[np.ndarray, np.ndarray], Parts]
    check: Callable[[Mapping[str, np.ndarray], Shape, np.dtype], None]
    decode: Callable[[Mapping[str, np.ndarray], Shape], np.ndarray]
    size_of: Callable[[Shape, np.ndarray, int], int] | None = None


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """(rows, width) of the 2-d view [shape[0], -1]; a 0-d tensor is 1 by 1."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def expect_parts(parts: Mapping[str, np.ndarray], spec: Mapping[str, tuple[str, Shape]]) -> None:
    """FormatError unless the parts have exactly these names, dtypes (NumPy codes) and shapes."""
    if set(parts) != set(spec):
        raise FormatError(f"parts are {sorted(parts)}, this format has {sorted(spec)}")
    for name, (code, shape) in spec.items():
        part = parts[name]
        if part.dtype != np.dtype(code) or part.shape != shape:
            raise FormatError(
                f"part {name!r} is {part.dtype} {list(part.shape)}, "
                f"expected {np.dtype(code)} {list(shape)}"
            )


def stored_count(parts: Mapping[str, np.ndarray]) -> int:
    """Length of the part `values`; FormatError unless it is one-dimensional."""
    values = parts["values"]
    if values.ndim != 1:
        raise FormatError(f"part 'values' has shape {list(values.shape)}, expected one dimension")
    return len(values)


def allocate(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Zeros; FormatError where the claimed shape does not fit into memory."""
    try:
        return np.zeros(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise FormatError(
            f"shape {list(shape)} of {dtype} does not fit into memory; is the file trusted?"
        ) from error

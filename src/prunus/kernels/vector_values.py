"""The values of groups as they are stored, in float32, bfloat16 or int8, and what X rounds to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from prunus.errors import ValueRangeError


@dataclass(frozen=True)
class Storage:
    """How one precision is stored: `multiple` columns at a time, in tiles of `tile`; 0: none."""

    kind: int
    name: str
    dtype: np.dtype
    tile: int
    multiple: int


STORAGES = {
    "float32": Storage(32, "vectors_f32", np.dtype("<f4"), 0, 1),
    "bfloat16": Storage(33, "vectors_bf16", np.dtype("<u2"), 32, 2),
    "int8": Storage(34, "vectors_i8", np.dtype("i1"), 64, 4),
}
BY_KIND = {storage.kind: storage for storage in STORAGES.values()}
BY_NAME = {storage.name: storage for storage in STORAGES.values()}
LEAST_RANGE = np.float32(1e-30)
"""Tokens whose values span less, but not nothing, are not rounded to bytes."""
MOST_RANGE = np.float32(3.4e38)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 round(w / s), s float32) of every row, s = max|row| / 127; ValueRangeError for NaN."""
    peaks = np.abs(matrix).max(axis=1, initial=0.0)
    if not np.isfinite(peaks).all():
        row = int(np.flatnonzero(~np.isfinite(peaks))[0])
        raise ValueRangeError(f"row {row} holds NaN or infinity, which int8 cannot; use float32")
    scales = (peaks / np.float32(127)).astype(np.float32)
    inverse = np.divide(1.0, scales, where=scales > 0, out=np.zeros(len(scales)), dtype=np.float64)
    scaled = np.rint(matrix * inverse[:, None])
    return np.clip(scaled, -127, 127).astype(np.int8), scales


def rounded_tokens(x: np.ndarray) -> np.ndarray:
    """Float64 [K, N] of what int8 kernels multiply: bytes of each column of X, taken back.

    x ~ s (u - z) with s = (high - low) / 255, z = round(-low / s), u = round(x / s) + z in 0..255,
    low <= 0 <= high; every step in float32. Columns that hold NaN or infinity, or span less than
    1e-30 or more than 3.4e38, stay as they are.
    """
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        low = np.fmin(x.min(axis=0, initial=0), np.float32(0))
        width = np.fmax(x.max(axis=0, initial=0), np.float32(0)) - low
        fits = np.isfinite(x).all(axis=0) & (width >= LEAST_RANGE) & (width <= MOST_RANGE)
        inverse = np.divide(
            np.float32(255), width, where=fits, out=np.zeros(x.shape[1], np.float32)
        )
        scale = np.where(fits, width / np.float32(255), np.float32(0))
        zero = np.rint(np.where(fits, -low * inverse, np.float32(0)))
        steps = np.rint(np.where(fits, x, np.float32(0)) * inverse) + zero
    taken = (np.clip(steps, 0, 255) - zero).astype(np.float64) * scale
    return np.where(fits, taken, x)


def tiles(offsets: np.ndarray, size: int) -> list[tuple[int, int]]:
    """(first column, width) of every tile of at most `size` columns."""
    ends = offsets.astype(np.int64)
    return [
        (begin, min(size, int(end) - begin))
        for start, end in itertools.pairwise(ends)
        for begin in range(int(start), int(end), size)
    ]


def padded(
    columns: np.ndarray, vectors: np.ndarray, counts: np.ndarray, multiple: int, column: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every group to a multiple of so many columns: `column`, with vectors of zeros, behind."""
    missing = -counts % multiple
    at = np.repeat(np.cumsum(counts), missing)
    return np.insert(columns, at, column), np.insert(vectors, at, 0, axis=0), counts + missing


def stored(vectors: np.ndarray, offsets: np.ndarray, storage: Storage) -> np.ndarray:
    """The section of values of vectors [columns, height], already in their dtype."""
    if not storage.tile:
        return np.ascontiguousarray(vectors).ravel()
    height = vectors.shape[1]
    out = np.empty(vectors.size, storage.dtype)
    for begin, width in tiles(offsets, storage.tile):
        out[begin * height : (begin + width) * height] = vectors[begin : begin + width].T.ravel()
    return out


def taken_apart(
    values: np.ndarray, offsets: np.ndarray, height: int, storage: Storage
) -> np.ndarray:
    """What `stored` was made of, [columns of all groups, height]."""
    if not storage.tile:
        return values.reshape(-1, height)
    out = np.empty((len(values) // height, height), storage.dtype)
    for begin, width in tiles(offsets, storage.tile):
        tile = values[begin * height : (begin + width) * height].reshape(height, width)
        out[begin : begin + width] = tile.T
    return out

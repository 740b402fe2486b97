"""vector: groups of consecutive outputs share their columns, and so does their index.

Of the 2-d view [shape[0], -1], `height` consecutive rows are a group; a column is stored for all of
them if one keeps a value there, zeros included, and so is the last group if rows are missing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunus.errors import FormatError, ShapeError
from prunus.formats import sizes
from prunus.formats.csr import MAX_NONZEROS, MAX_WIDTH, check_compressed
from prunus.formats.packed import Format, Parts, Shape, allocate, expect_parts, matrix_shape

HEIGHTS = (2, 4, 8, 16, 32)


def _counts(keep: np.ndarray) -> dict[int, int]:
    """{height: stored columns of all groups} of a mask [rows, width]."""
    counts, held, below = {}, keep, 1
    for height in HEIGHTS:
        step = height // below
        held = np.pad(held, ((0, -len(held) % step), (0, 0)))
        held = np.asarray(held.reshape(len(held) // step, step, held.shape[1]).any(axis=1))
        counts[height], below = int(np.count_nonzero(held)), height
    return counts


def _sizes(shape: Shape, keep: np.ndarray, bits: int) -> dict[int, int]:
    """{height: bytes} of a mask."""
    counts = _counts(keep.reshape(matrix_shape(shape)))
    return {h: sizes.vector_bytes(shape, count, bits, h) for h, count in counts.items()}


def _best(shape: Shape, keep: np.ndarray, bits: int) -> int:
    """The height of fewest bytes; the larger one where they tie."""
    held = _sizes(shape, keep, bits)
    return min(reversed(held), key=held.__getitem__)


def _least(shape: Shape, nonzeros: int, bits: int) -> int:
    """Bytes where the non-zeros fill vectors of the largest height."""
    index = sizes.vector_bytes(shape, -(-nonzeros // HEIGHTS[-1]), 0, HEIGHTS[-1])
    return index + sizes.value_bytes(nonzeros, bits)


def _encode(array: np.ndarray, keep: np.ndarray) -> Parts:
    rows, width = matrix_shape(array.shape)
    height = _best(array.shape, keep, array.itemsize * 8)
    down = -(-rows // height)
    matrix = np.zeros((down * height, width), array.dtype)
    matrix[:rows] = array.reshape(rows, width)
    kept = np.zeros((down * height, width), bool)
    kept[:rows] = keep.reshape(rows, width)
    members, columns = np.nonzero(kept.reshape(down, height, width).any(axis=1))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(members, minlength=down))))
    if offsets[-1] > MAX_NONZEROS or width > MAX_WIDTH:
        raise ShapeError(
            f"shape {list(array.shape)} with {offsets[-1]} vectors does not fit 32-bit offsets and "
            f"columns; use format='bitmap'"
        )
    return {
        "values": np.ascontiguousarray(matrix.reshape(down, height, width)[members, :, columns]),
        "columns": columns.astype(f"<u{sizes.column_bytes(width)}"),
        "group_offsets": offsets.astype("<u4"),
    }


def _check(parts: Mapping[str, np.ndarray], shape: Shape, storage: np.dtype) -> None:
    rows, width = matrix_shape(shape)
    held = parts["values"].shape
    if len(held) != 2 or held[1] not in HEIGHTS:
        raise FormatError(f"part 'values' has shape {list(held)}, expected [columns, height]")
    spec = {
        "values": (storage.str, held),
        "columns": (f"<u{sizes.column_bytes(width)}", held[:1]),
        "group_offsets": ("<u4", (-(-rows // held[1]) + 1,)),
    }
    expect_parts(parts, spec)
    check_compressed(parts["group_offsets"], parts["columns"], width)
    missing = -rows % held[1]
    last = parts["values"][int(parts["group_offsets"][-2]) :] if rows else parts["values"]
    if missing and last[:, held[1] - missing :].any():
        raise FormatError(f"values of rows beyond the {rows} there are; the data is corrupt")


def _decode(parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
    rows, width = matrix_shape(shape)
    values = parts["values"]
    height = values.shape[1]
    counts = np.diff(parts["group_offsets"].astype(np.int64))
    out = allocate((len(counts), height, width), values.dtype)
    out[np.repeat(np.arange(len(counts)), counts), :, parts["columns"]] = values
    return out.reshape(-1, width)[:rows].reshape(shape) if out.size else allocate(shape, out.dtype)


VECTOR = Format(
    "vector",
    _least,
    _encode,
    _check,
    _decode,
    lambda shape, keep, bits: min(_sizes(shape, keep, bits).values()),
)

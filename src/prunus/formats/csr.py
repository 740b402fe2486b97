"""csr: compressed rows of the 2-d view [shape[0], -1], columns ascending within a row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunus.errors import FormatError, ShapeError
from prunus.formats import sizes
from prunus.formats.packed import (
    Format,
    Parts,
    Shape,
    allocate,
    expect_parts,
    matrix_shape,
    stored_count,
)

MAX_NONZEROS = (1 << 32) - 1
MAX_WIDTH = 1 << 32


def _column_dtype(width: int) -> np.dtype:
    return np.dtype(f"<u{sizes.column_bytes(width)}")


def _encode(array: np.ndarray, keep: np.ndarray) -> Parts:
    rows, width = matrix_shape(array.shape)
    keep = keep.reshape(rows, width)
    counts = np.count_nonzero(keep, axis=1)
    offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    if offsets[-1] > MAX_NONZEROS or width > MAX_WIDTH:
        raise ShapeError(
            f"shape {list(array.shape)} with {offsets[-1]} non-zeros does not fit csr's 32-bit "
            f"offsets and columns; use format='bitmap'"
        )
    columns = np.nonzero(keep)[1].astype(_column_dtype(width))
    values = array.reshape(rows, width)[keep]
    return {"values": values, "columns": columns, "row_offsets": offsets.astype("<u4")}


def _check(parts: Mapping[str, np.ndarray], shape: Shape, storage: np.dtype) -> None:
    rows, width = matrix_shape(shape)
    count = (stored_count(parts),)
    spec = {
        "values": (storage.str, count),
        "columns": (_column_dtype(width).str, count),
        "row_offsets": ("<u4", (rows + 1,)),
    }
    expect_parts(parts, spec)
    check_compressed(parts["row_offsets"], parts["columns"], width)


def check_compressed(offsets: np.ndarray, columns: np.ndarray, width: int) -> None:
    """FormatError unless offsets rise from 0 to len(columns), columns ascend and are < width."""
    if offsets[0] != 0 or offsets[-1] != len(columns) or np.any(offsets[1:] < offsets[:-1]):
        raise FormatError(
            f"row offsets do not rise from 0 to {len(columns)} non-zeros; the data is corrupt"
        )
    if len(columns) == 0:
        return
    if int(columns.max()) >= width:
        raise FormatError(f"column {int(columns.max())} lies outside the width {width}")
    ascending = np.ones(len(columns) + 1, bool)
    ascending[1:-1] = columns[1:] > columns[:-1]
    ascending[offsets] = True  # the first column of a row may be smaller than the one before
    if not ascending.all():
        raise FormatError("columns do not ascend strictly within a row; the data is corrupt")


def _decode(parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
    rows, width = matrix_shape(shape)
    out = allocate(shape, parts["values"].dtype)
    counts = np.diff(parts["row_offsets"].astype(np.int64))
    out.reshape(rows, width)[np.repeat(np.arange(rows), counts), parts["columns"]] = parts["values"]
    return out


CSR = Format("csr", sizes.csr_bytes, _encode, _check, _decode)

"""Blobs of weights whose outputs share their columns in groups: vector(V, 1), and blocks.

Layout (little-endian): a 64-byte header; the outputs of the packed rows, uint32 [rows], where they
are in another order; column offsets uint32 [groups + 1]; columns uint16; values. Each section is
aligned to 64 bytes. `height` consecutive packed rows are a group, and every column of a group has a
value for each of them, zeros included. float32: values [column][height]. bfloat16, in pairs of
columns: tiles [height][up to 32 columns], the last one as wide as it must be; a group of an odd
number of columns ends in column `cols`, whose values are zero.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

import numpy as np

from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels.header import MAGIC, MAX_SIDE, VERSION, BlobInfo

HEIGHTS = (4, 8, 16, 32)
MAX_COLUMNS = (1 << 16) - 1
TILE = 32
NAMES = {32: "vectors_f32", 33: "vectors_bf16"}
KINDS = {"float32": 32, "bfloat16": 33}
_HEADER = struct.Struct("<4sHHQQQHHIQQQ")


@dataclass(frozen=True)
class Groups:
    """Views of a blob: the outputs of its rows or None, offsets, columns and values as stored."""

    info: BlobInfo
    order: np.ndarray | None
    offsets: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def vectors(self) -> np.ndarray:
        """The values as float32 [columns of all groups, height], padding included."""
        height = self.info.height
        if self.info.kind == "vectors_f32":
            return self.values.reshape(-1, height)
        wide = from_bf16(self.values)
        out = np.empty((len(self.columns), height), np.float32)
        for begin, width in _tiles(self.offsets):
            tile = wide[begin * height : (begin + width) * height].reshape(height, width)
            out[begin : begin + width] = tile.T
        return out

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(output, column, value) of every stored value, zeros within vectors included."""
        info, counts = self.info, np.diff(self.offsets.astype(np.int64))
        first = np.repeat(np.arange(len(counts)) * info.height, counts)
        rows = (first[:, None] + np.arange(info.height)).ravel()
        columns = np.repeat(self.columns.astype(np.int64), info.height)
        real = (rows < info.rows) & (columns < info.cols)
        rows, columns, values = rows[real], columns[real], self.vectors().ravel()[real]
        return (rows if self.order is None else self.order[rows].astype(np.int64)), columns, values


def _tiles(offsets: np.ndarray) -> list[tuple[int, int]]:
    """(first column, width) of every tile."""
    ends = offsets.astype(np.int64)
    return [
        (begin, min(TILE, int(end) - begin))
        for start, end in itertools.pairwise(ends)
        for begin in range(int(start), int(end), TILE)
    ]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack_vectors(
    weight: np.ndarray,
    height: int,
    dtype: str = "float32",
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Blob of a float32 weight [rows, ...], `height` (4, 8, 16, 32) outputs sharing their columns.

    A group stores a column if any of its outputs keeps a weight there; the others hold zeros that
    are multiplied like values. dtype: of the stored values, "float32" or "bfloat16" (rounded to
    nearest; X is rounded, too, sums are fp32). order: packed row i is output order[i].
    Raises ShapeError and ValueRangeError.
    """
    if weight.ndim < 2 or weight.dtype != np.float32:
        raise ShapeError(f"a weight {weight.dtype} {list(weight.shape)} is no float32 matrix")
    if height not in HEIGHTS or dtype not in KINDS:
        raise ValueRangeError(
            f"groups of {height} in {dtype}: heights are {HEIGHTS}, types {', '.join(KINDS)}"
        )
    matrix = weight.reshape(len(weight), -1) if weight.size else np.zeros(_matrix(weight), "f4")
    rows, cols = matrix.shape
    if cols > MAX_COLUMNS or rows > MAX_SIDE:
        raise ShapeError(f"groups hold at most {MAX_COLUMNS} columns, the weight has {cols}")
    order = _checked_order(order, rows)
    padded = np.zeros((-(-rows // height) * height, cols), np.float32)
    padded[:rows] = matrix if order is None else matrix[order]
    grouped = padded.reshape(len(padded) // height, height, cols)
    members, columns = np.nonzero((grouped != 0).any(axis=1))
    counts = np.bincount(members, minlength=len(grouped))
    vectors = grouped[members, :, columns]
    if dtype == "bfloat16":
        vectors = from_bf16(to_bf16(vectors))
    nonzeros = int(np.count_nonzero(vectors))
    if dtype == "bfloat16":
        odd = np.cumsum(counts)[counts % 2 == 1]
        columns, vectors = np.insert(columns, odd, cols), np.insert(vectors, odd, 0.0, axis=0)
        counts = counts + counts % 2
    offsets = np.concatenate(([0], np.cumsum(counts)))
    if int(offsets[-1]) * height >= 1 << 32:
        raise ShapeError(f"{offsets[-1]} vectors of {height} exceed 32-bit offsets")
    values = _stored(vectors, offsets, dtype)
    return _assembled((rows, cols), nonzeros, height, dtype, order, (offsets, columns, values))


def _matrix(weight: np.ndarray) -> tuple[int, int]:
    """Shape of the 2-d view of an empty weight."""
    return weight.shape[0], int(np.prod(weight.shape[1:]))


def _checked_order(order: np.ndarray | None, rows: int) -> np.ndarray | None:
    """The order as uint32, None for the trivial one."""
    if order is None:
        return None
    order = np.asarray(order)
    if order.shape != (rows,) or not np.array_equal(np.sort(order), np.arange(rows)):
        raise ValueRangeError(f"order is no permutation of the {rows} outputs")
    return None if np.array_equal(order, np.arange(rows)) else order.astype(np.uint32)


def _stored(vectors: np.ndarray, offsets: np.ndarray, dtype: str) -> np.ndarray:
    """The section of values of vectors [columns, height]."""
    if dtype == "float32":
        return np.ascontiguousarray(vectors).ravel()
    bits, height = to_bf16(vectors), vectors.shape[1]
    out = np.empty(bits.size, np.uint16)
    for begin, width in _tiles(offsets):
        out[begin * height : (begin + width) * height] = bits[begin : begin + width].T.ravel()
    return out


def _places(
    rows: int, height: int, count: int, item: int, permuted: bool
) -> tuple[int, int, int, int]:
    """Byte offsets of offsets, columns and values, and the end."""
    offsets = _align(_HEADER.size + (4 * rows if permuted else 0))
    columns = _align(offsets + 4 * (-(-rows // height) + 1))
    values = _align(columns + 2 * count)
    return offsets, columns, values, _align(values + item * count * height)


def _align(position: int) -> int:
    return (position + 63) // 64 * 64


def _assembled(
    shape: tuple[int, int],
    nonzeros: int,
    height: int,
    dtype: str,
    order: np.ndarray | None,
    sections: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> np.ndarray:
    """A 64-byte aligned blob of these sections."""
    offsets, columns, values = sections
    permuted = order is not None
    *places, end = _places(shape[0], height, len(columns), values.itemsize, permuted)
    raw = np.zeros(end + 63, np.uint8)
    start = -raw.ctypes.data % 64
    blob = raw[start : start + end]
    fields = (MAGIC, VERSION, KINDS[dtype], *shape, nonzeros, height, int(permuted), len(columns))
    blob[: _HEADER.size] = np.frombuffer(_HEADER.pack(*fields, *places), np.uint8)
    views = groups(blob)
    if views.order is not None and order is not None:
        views.order[:] = order
    views.offsets[:], views.columns[:], views.values[:] = offsets, columns, values
    return blob


def length(head: bytes) -> int:
    """Bytes of the blob that begins with this header."""
    fields = _HEADER.unpack(head)
    kind, rows, height, permuted, count = fields[2], fields[3], fields[6], fields[7], fields[8]
    return _places(
        rows, max(1, height), count, 4 if kind == KINDS["float32"] else 2, bool(permuted)
    )[3]


def info(blob: np.ndarray) -> BlobInfo:
    """The header, checked against the blob's length; FormatError if it is wrong."""
    fields = _HEADER.unpack(blob[: _HEADER.size].tobytes())
    _, version, kind, rows, cols, nnz, height, permuted, count, *places = fields
    if version != VERSION or kind not in NAMES:
        raise FormatError(f"blob version {version}, kind {kind} is unknown; pack the weight again")
    if rows > MAX_SIDE or cols > MAX_COLUMNS or height not in HEIGHTS or permuted > 1:
        raise FormatError(f"blob of {rows} by {cols} in groups of {height}: out of range")
    *wanted, end = _places(
        rows, height, count, 4 if kind == KINDS["float32"] else 2, bool(permuted)
    )
    if places != wanted or end != len(blob) or nnz > count * height:
        raise FormatError(f"blob sections do not match its {len(blob)} bytes; it is corrupt")
    return BlobInfo(
        NAMES[kind], version, rows, cols, nnz, max(1, cols), 1, len(blob), height, bool(permuted)
    )


def groups(blob: np.ndarray) -> Groups:
    """Views of a blob's sections; the header is checked, the contents are not (see validate)."""
    head = info(blob)
    count = int(blob[36:40].view("<u4")[0])
    item, code = (4, "<f4") if head.kind == "vectors_f32" else (2, "<u2")
    at_offsets, at_columns, at_values, _ = _places(
        head.rows, head.height, count, item, head.permuted
    )
    order = blob[64 : 64 + 4 * head.rows].view("<u4") if head.permuted else None
    return Groups(
        head,
        order,
        blob[at_offsets : at_offsets + 4 * (-(-head.rows // head.height) + 1)].view("<u4"),
        blob[at_columns : at_columns + 2 * count].view("<u2"),
        blob[at_values : at_values + item * count * head.height].view(code),
    )


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless every offset, column and output is in bounds."""
    views = groups(blob)
    head, offsets, columns = views.info, views.offsets.astype(np.int64), views.columns
    if offsets[0] != 0 or offsets[-1] != len(columns) or np.any(np.diff(offsets) < 0):
        raise FormatError("column offsets do not rise from 0 to the last; the blob is corrupt")
    padding = np.zeros(len(columns), bool)
    if head.kind == "vectors_bf16":
        if np.any(offsets % 2):
            raise FormatError("an odd number of columns in a group of pairs; the blob is corrupt")
        ends = offsets[1:][np.diff(offsets) > 0] - 1
        padding[ends] = columns[ends] == head.cols
    if np.any(columns[~padding] >= head.cols):
        raise FormatError(f"a column lies outside the width {head.cols}; the blob is corrupt")
    if views.order is not None and not np.array_equal(np.sort(views.order), np.arange(head.rows)):
        raise FormatError("the outputs are no permutation; the blob is corrupt")
    held = views.vectors()
    if np.count_nonzero(held) != head.nnz or np.count_nonzero(held[padding]):
        raise FormatError(f"the header claims {head.nnz} non-zeros; the blob is corrupt")
    return head


def unpack(blob: np.ndarray) -> np.ndarray:
    """Dense float32 [rows, cols]; FormatError if the blob is corrupt."""
    head = validate(blob)
    try:
        out = np.zeros((head.rows, head.cols), np.float32)
    except (MemoryError, ValueError) as error:
        raise FormatError(
            f"a dense {head.rows} by {head.cols} matrix does not fit into memory"
        ) from error
    rows, columns, values = groups(blob).entries()
    out[rows, columns] = values
    return out

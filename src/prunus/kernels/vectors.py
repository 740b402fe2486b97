"""Blobs of weights whose outputs share their columns in groups: vector(V, 1), and blocks.

Layout (little-endian): a 64-byte header; the outputs of the packed rows, uint32 [rows], where they
are in another order; column offsets uint32 [groups + 1]; columns uint16; values. Each section is
aligned to 64 bytes. `height` consecutive packed rows are a group, and every column of a group has a
value for each of them, zeros included. float32: values [column][height]. bfloat16, in pairs of
columns: tiles [height][up to 32 columns], the last one as wide as it must be; a group of an odd
number of columns ends in column `cols`, whose values are zero. int8, in fours of columns: scales
float32 and sums int32 of the packed rows, then tiles [height][up to 64 columns]; a group ends in up
to three columns `cols`. A row of int8 is values times its scale.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels.header import MAGIC, MAX_SIDE, VERSION, BlobInfo
from prunus.kernels.header import align as _align
from prunus.kernels.vector_values import (
    BY_KIND,
    BY_NAME,
    STORAGES,
    Storage,
    from_bf16,
    padded,
    stored,
    taken_apart,
    to_bf16,
    to_int8,
)

HEIGHTS = (4, 8, 16, 32)
MAX_COLUMNS = (1 << 16) - 1
NAMES = {kind: storage.name for kind, storage in BY_KIND.items()}
_HEADER = struct.Struct("<4sHHQQQHHIQQQ")


@dataclass(frozen=True)
class Groups:
    """Views of a blob: the outputs of its rows or None, offsets, columns and values as stored.

    scales, sums: of each packed row of int8, else empty.
    """

    info: BlobInfo
    order: np.ndarray | None
    offsets: np.ndarray
    columns: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    values: np.ndarray

    @property
    def storage(self) -> Storage:
        """How the values are stored."""
        return BY_NAME[self.info.kind]

    def raw(self) -> np.ndarray:
        """The values as stored, [columns of all groups, height], padding included."""
        return taken_apart(self.values, self.offsets, self.info.height, self.storage)

    def vectors(self) -> np.ndarray:
        """The values as float32 [columns of all groups, height], padding included."""
        raw = self.raw()
        if self.info.kind == "vectors_bf16":
            return from_bf16(raw)
        if self.info.kind == "vectors_f32":
            return raw
        counts = np.diff(self.offsets.astype(np.int64))
        scales = np.repeat(self.scales.reshape(-1, self.info.height), counts, axis=0)
        return raw.astype(np.float32) * scales

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(output, column, value) of every stored value, zeros within vectors included."""
        info, counts = self.info, np.diff(self.offsets.astype(np.int64))
        first = np.repeat(np.arange(len(counts)) * info.height, counts)
        rows = (first[:, None] + np.arange(info.height)).ravel()
        columns = np.repeat(self.columns.astype(np.int64), info.height)
        real = (rows < info.rows) & (columns < info.cols)
        rows, columns, values = rows[real], columns[real], self.vectors().ravel()[real]
        return (rows if self.order is None else self.order[rows].astype(np.int64)), columns, values


def pack_vectors(
    weight: np.ndarray,
    height: int,
    dtype: str = "float32",
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Blob of a float32 weight [rows, ...], `height` (4, 8, 16, 32) outputs sharing their columns.

    A group stores a column if any of its outputs keeps a weight there; the others hold zeros that
    are multiplied like values. dtype: of the stored values; "float32"; "bfloat16" (rounded to
    nearest; X is rounded, too, sums are fp32); "int8" (a scale per output; X is rounded to bytes
    with a scale and zero per token, see `rounded_tokens`; sums are int32). order: packed row i is
    output order[i]. Raises ShapeError and ValueRangeError.
    """
    if weight.ndim < 2 or weight.dtype != np.float32:
        raise ShapeError(f"a weight {weight.dtype} {list(weight.shape)} is no float32 matrix")
    if height not in HEIGHTS or dtype not in STORAGES:
        raise ValueRangeError(
            f"groups of {height} in {dtype}: heights are {HEIGHTS}, types {', '.join(STORAGES)}"
        )
    matrix = weight.reshape(len(weight), -1) if weight.size else np.zeros(_matrix(weight), "f4")
    rows, cols = matrix.shape
    if cols > MAX_COLUMNS or rows > MAX_SIDE:
        raise ShapeError(f"groups hold at most {MAX_COLUMNS} columns, the weight has {cols}")
    order = _checked_order(order, rows)
    whole = np.zeros((-(-rows // height) * height, cols), np.float32)
    whole[:rows] = matrix if order is None else matrix[order]
    grouped = whole.reshape(len(whole) // height, height, cols)
    members, columns = np.nonzero((grouped != 0).any(axis=1))
    counts = np.bincount(members, minlength=len(grouped))
    raw, scales, sums = _converted(whole, dtype)
    vectors = raw.reshape(grouped.shape)[members, :, columns]
    storage = STORAGES[dtype]
    columns, vectors, counts = padded(columns, vectors, counts, storage.multiple, cols)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    if int(offsets[-1]) * height >= 1 << 32:
        raise ShapeError(f"{offsets[-1]} vectors of {height} exceed 32-bit offsets")
    sections = (offsets, columns, scales, sums, stored(vectors, offsets, storage))
    return _assembled((rows, cols), _nonzeros(vectors, dtype), height, storage, order, sections)


def _converted(matrix: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values as they are stored, scales and sums of the rows where there are any)."""
    if dtype == "int8":
        values, scales = to_int8(matrix)
        return values, scales, values.sum(axis=1, dtype=np.int32)
    values = to_bf16(matrix) if dtype == "bfloat16" else matrix
    return values, np.zeros(0, np.float32), np.zeros(0, np.int32)


def _nonzeros(raw: np.ndarray, dtype: str) -> int:
    """Values that are not zero, of either sign."""
    return int(np.count_nonzero(raw << 1 if dtype == "bfloat16" else raw))


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


def _places(
    rows: int, height: int, count: int, storage: Storage, permuted: bool
) -> tuple[int, int, int, int, int]:
    """Byte offsets of offsets, columns, values with their scales, values alone, and the end."""
    groups = -(-rows // height)
    offsets = _align(_HEADER.size + (4 * rows if permuted else 0))
    columns = _align(offsets + 4 * (groups + 1))
    values = _align(columns + 2 * count)
    alone = _align(values + (8 * groups * height if storage.name == "vectors_i8" else 0))
    return offsets, columns, values, alone, _align(alone + storage.dtype.itemsize * count * height)


def _assembled(
    shape: tuple[int, int],
    nonzeros: int,
    height: int,
    storage: Storage,
    order: np.ndarray | None,
    sections: tuple[np.ndarray, ...],
) -> np.ndarray:
    """A 64-byte aligned blob of these sections."""
    offsets, columns, scales, sums, values = sections
    permuted = order is not None
    *places, _, end = _places(shape[0], height, len(columns), storage, permuted)
    raw = np.zeros(end + 63, np.uint8)
    start = -raw.ctypes.data % 64
    blob = raw[start : start + end]
    fields = (MAGIC, VERSION, storage.kind, *shape, nonzeros, height, int(permuted), len(columns))
    blob[: _HEADER.size] = np.frombuffer(_HEADER.pack(*fields, *places), np.uint8)
    views = groups(blob)
    if views.order is not None and order is not None:
        views.order[:] = order
    views.offsets[:], views.columns[:], views.values[:] = offsets, columns, values
    views.scales[:], views.sums[:] = scales, sums
    return blob


def length(head: bytes) -> int:
    """Bytes of the blob that begins with this header."""
    fields = _HEADER.unpack(head)
    kind, rows, height, permuted, count = fields[2], fields[3], fields[6], fields[7], fields[8]
    return _places(rows, max(1, height), count, BY_KIND[kind], bool(permuted))[-1]


def info(blob: np.ndarray) -> BlobInfo:
    """The header, checked against the blob's length; FormatError if it is wrong."""
    fields = _HEADER.unpack(blob[: _HEADER.size].tobytes())
    _, version, kind, rows, cols, nnz, height, permuted, count, *places = fields
    if version != VERSION or kind not in NAMES:
        raise FormatError(f"blob version {version}, kind {kind} is unknown; pack the weight again")
    if rows > MAX_SIDE or cols > MAX_COLUMNS or height not in HEIGHTS or permuted > 1:
        raise FormatError(f"blob of {rows} by {cols} in groups of {height}: out of range")
    *wanted, _, end = _places(rows, height, count, BY_KIND[kind], bool(permuted))
    if places != wanted or end != len(blob) or nnz > count * height:
        raise FormatError(f"blob sections do not match its {len(blob)} bytes; it is corrupt")
    return BlobInfo(
        NAMES[kind], version, rows, cols, nnz, max(1, cols), 1, len(blob), height, bool(permuted)
    )


def groups(blob: np.ndarray) -> Groups:
    """Views of a blob's sections; the header is checked, the contents are not (see validate)."""
    head = info(blob)
    count = int(blob[36:40].view("<u4")[0])
    storage = BY_NAME[head.kind]
    at_offsets, at_columns, at_scales, at_values, _ = _places(
        head.rows, head.height, count, storage, head.permuted
    )
    order = blob[64 : 64 + 4 * head.rows].view("<u4") if head.permuted else None
    groups = -(-head.rows // head.height)
    rows = groups * head.height if storage.name == "vectors_i8" else 0
    return Groups(
        head,
        order,
        blob[at_offsets : at_offsets + 4 * (groups + 1)].view("<u4"),
        blob[at_columns : at_columns + 2 * count].view("<u2"),
        blob[at_scales : at_scales + 4 * rows].view("<f4"),
        blob[at_scales + 4 * rows : at_scales + 8 * rows].view("<i4"),
        blob[at_values : at_values + storage.dtype.itemsize * count * head.height].view(
            storage.dtype
        ),
    )


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless every offset, column and output is in bounds."""
    views = groups(blob)
    head, offsets, columns = views.info, views.offsets.astype(np.int64), views.columns
    if offsets[0] != 0 or offsets[-1] != len(columns) or np.any(np.diff(offsets) < 0):
        raise FormatError("column offsets do not rise from 0 to the last; the blob is corrupt")
    multiple = views.storage.multiple
    if np.any(offsets % multiple):
        raise FormatError(f"a group is no multiple of {multiple} columns; the blob is corrupt")
    padding = np.zeros(len(columns), bool)
    for behind in range(1, multiple):
        ends = offsets[1:][np.diff(offsets) > 0] - behind
        padding[ends] = columns[ends] == head.cols
    if np.any(columns[~padding] >= head.cols):
        raise FormatError(f"a column lies outside the width {head.cols}; the blob is corrupt")
    if views.order is not None and not np.array_equal(np.sort(views.order), np.arange(head.rows)):
        raise FormatError("the outputs are no permutation; the blob is corrupt")
    held = views.raw()
    if views.storage.name == "vectors_bf16":
        held = held << 1  # -0.0 is a zero
    if np.count_nonzero(held) != head.nnz or np.count_nonzero(held[padding]):
        raise FormatError(f"the header claims {head.nnz} non-zeros; the blob is corrupt")
    _check_rows(views)
    return head


def _check_rows(views: Groups) -> None:
    """FormatError unless scales are finite and sums are those of the rows."""
    if not len(views.scales):
        return
    members = np.repeat(np.arange(len(views.offsets) - 1), np.diff(views.offsets.astype(np.int64)))
    sums = np.zeros((len(views.offsets) - 1, views.info.height), np.int32)
    np.add.at(sums, members, views.raw().astype(np.int32))
    if not np.isfinite(views.scales).all() or not np.array_equal(sums.ravel(), views.sums):
        raise FormatError("the scales or sums of the rows do not fit the values; it is corrupt")


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

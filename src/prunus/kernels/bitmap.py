"""Bitmap blobs: a packed weight with one bit per position, for few columns of X.

Layout (little-endian): the 64-byte header, then sections aligned to 64 bytes: group offsets uint32
[groups + 1]; for int8 the scales float32 and sums int32 [16·groups], one per row; masks uint64
[groups, quads]; values. 64 readable bytes follow the last value. A group is 16 rows, a quad 4
columns of it. float32, bfloat16: bit 16·column + row; int8: bit 4·row + column. A group's values
lie in the order of its quads and their bits. A row of int8 is values times its scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from prunus.errors import FormatError, ShapeError
from prunus.formats.csr import MAX_NONZEROS
from prunus.kernels import header
from prunus.kernels.header import BlobInfo, align
from prunus.kernels.vector_values import from_bf16, to_bf16, to_int8

ROWS = 16
QUAD = 4
STORAGE = {
    "bitmap_f32": np.dtype("<f4"),
    "bitmap_bf16": np.dtype("<u2"),
    "bitmap_i8": np.dtype("i1"),
}
_PADDING = 64
_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class BitmapSections:
    """Views of a bitmap blob; scales and sums are empty unless the values are int8."""

    info: BlobInfo
    offsets: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    masks: np.ndarray
    stored: np.ndarray

    def rows_and_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column (int64) of every stored value, in storage order."""
        group, quad, first, second = np.nonzero(_bits(self.masks, self.info.kind))
        row, column = (first, second) if self.info.kind == "bitmap_i8" else (second, first)
        return group * ROWS + row, quad * QUAD + column

    @property
    def values(self) -> np.ndarray:
        """What each stored value stands for, float32."""
        if self.info.kind == "bitmap_i8":
            rows, _ = self.rows_and_columns()
            return self.stored.astype(np.float32) * self.scales[rows]
        if self.info.kind == "bitmap_bf16":
            return from_bf16(self.stored)
        return self.stored


def pack(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Blob of a float32 [rows, cols] in the precision of `kind`; what rounds to zero is not stored.

    bfloat16 rounds to nearest even; int8 is round(w / s) with s = max|row| / 127.
    Raises ShapeError, and ValueRangeError for int8 of a row with NaN or infinity.
    """
    rows, cols = matrix.shape
    shape = (-(-rows // ROWS), -(-cols // QUAD))
    stored, scales = _converted(matrix, kind)
    padded = np.zeros((shape[0] * ROWS, shape[1] * QUAD), stored.dtype)
    padded[:rows, :cols] = stored
    order = (0, 2, 1, 3) if kind == "bitmap_i8" else (0, 2, 3, 1)
    tiles = padded.reshape(shape[0], ROWS, shape[1], QUAD).transpose(order)
    bits = (tiles << 1 if kind == "bitmap_bf16" else tiles) != 0  # -0.0 is a zero
    counts = np.count_nonzero(bits, axis=(1, 2, 3))
    nnz = int(counts.sum())
    if max(rows, cols) > header.MAX_SIDE or nnz > MAX_NONZEROS:
        raise ShapeError(f"shape {[rows, cols]} with {nnz} non-zeros exceeds 32-bit offsets")
    info = BlobInfo(kind, header.VERSION, rows, cols, nnz, ROWS, shape[0], 0)
    *places, end = _places(info)
    blob = header.allocate(replace(info, nbytes=end), places)
    views = sections(blob)
    views.offsets[1:] = np.cumsum(counts)
    views.masks[:] = np.packbits(bits.reshape(*shape, 64), axis=-1, bitorder="little").view("<u8")[
        ..., 0
    ]
    views.stored[:] = tiles[bits]
    if kind == "bitmap_i8":
        views.scales[:rows] = scales
        views.sums[:] = padded.sum(axis=1, dtype=np.int32)
    return blob


def _converted(matrix: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(values as they are stored, scale of each row)."""
    none = np.zeros(0, np.float32)
    if kind == "bitmap_f32":
        return matrix, none
    if kind == "bitmap_bf16":
        return to_bf16(matrix), none
    return to_int8(matrix)


def _places(info: BlobInfo) -> tuple[int, int, int, int]:
    """Byte offsets of group offsets, masks and values, and the end."""
    groups, quads = -(-info.rows // ROWS), -(-info.cols // QUAD)
    offsets = header.HEADER.size
    masks = align(offsets + 4 * (groups + 1))
    if info.kind == "bitmap_i8":
        masks = align(masks + 8 * ROWS * groups)
    values = align(masks + 8 * groups * quads)
    end = align(values + STORAGE[info.kind].itemsize * info.nnz + _PADDING)
    return offsets, masks, values, end


def nbytes(info: BlobInfo) -> int:
    """Length of a blob with this header, in bytes."""
    return _places(info)[3]


def check_header(info: BlobInfo, places: list[int]) -> BlobInfo:
    """The header itself; FormatError unless it fits its blob's length."""
    if max(info.rows, info.cols) > header.MAX_SIDE or info.nnz > MAX_NONZEROS:
        raise FormatError(f"blob of {info.rows} by {info.cols}, {info.nnz} non-zeros: out of range")
    if (info.block, info.blocks) != (ROWS, -(-info.rows // ROWS)):
        raise FormatError(f"blob claims {info.blocks} groups of {info.block} rows for {info.rows}")
    *wanted, end = _places(info)
    if places != wanted or end != info.nbytes:
        raise FormatError(f"blob sections do not match its {info.nbytes} bytes; it is corrupt")
    return info


def sections(blob: np.ndarray) -> BitmapSections:
    """Views of a blob's sections; the header is checked, the contents are not."""
    info = check_header(*header.read(blob))
    offsets, masks, values, _ = _places(info)
    groups, quads = info.blocks, -(-info.cols // QUAD)
    rows = ROWS * groups if info.kind == "bitmap_i8" else 0
    scales = align(offsets + 4 * (groups + 1))
    storage = STORAGE[info.kind]
    return BitmapSections(
        info,
        blob[offsets : offsets + 4 * (groups + 1)].view("<u4"),
        blob[scales : scales + 4 * rows].view("<f4"),
        blob[scales + 4 * rows : scales + 8 * rows].view("<i4"),
        blob[masks : masks + 8 * groups * quads].view("<u8").reshape(groups, quads),
        blob[values : values + storage.itemsize * info.nnz].view(storage),
    )


def _bits(masks: np.ndarray, kind: str) -> np.ndarray:
    """Bool [groups, quads, ...] of the masks: rows by columns for int8, else columns by rows."""
    tile = (ROWS, QUAD) if kind == "bitmap_i8" else (QUAD, ROWS)
    raw = np.ascontiguousarray(masks).reshape(-1).view(np.uint8).reshape(*masks.shape, 8)
    return np.unpackbits(raw, axis=-1, bitorder="little").view(bool).reshape(*masks.shape, *tile)


def _spread(views: BitmapSections) -> np.ndarray:
    """Every position of the groups, [groups, 16, quads, 4], as it is stored; zeros elsewhere."""
    bits = _bits(views.masks, views.info.kind)
    tiles = np.zeros(bits.shape, views.stored.dtype)
    tiles[bits] = views.stored
    return tiles.transpose((0, 2, 1, 3) if views.info.kind == "bitmap_i8" else (0, 3, 1, 2))


def dense(blob: np.ndarray) -> np.ndarray:
    """Dense float32 [rows, cols] of a validated blob."""
    views = sections(blob)
    info = views.info
    shape = (info.blocks * ROWS, -(-info.cols // QUAD) * QUAD)
    matrix = _spread(views).reshape(shape)[: info.rows, : info.cols]
    if info.kind == "bitmap_i8":
        return matrix * views.scales[: info.rows, None]
    if info.kind == "bitmap_bf16":
        return (matrix.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(matrix)


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless masks, offsets, sums and shape agree."""
    views = sections(blob)
    info = views.info
    raw = views.masks.reshape(-1).view(np.uint8).reshape(info.blocks, 8 * views.masks.shape[1])
    wanted = np.concatenate([[0], np.cumsum(_COUNTS[raw].sum(axis=1, dtype=np.int64))])
    if not np.array_equal(views.offsets, wanted) or wanted[-1] != info.nnz:
        raise FormatError("the group offsets do not count the bits of the masks; it is corrupt")
    last = _bits(views.masks[-1:], info.kind)
    edge = _bits(views.masks[:, -1:], info.kind)
    if info.kind == "bitmap_i8":
        last, edge = last.swapaxes(2, 3), edge.swapaxes(2, 3)
    rows, columns = info.rows % ROWS or ROWS, info.cols % QUAD or QUAD
    if last[..., rows:].any() or edge[:, :, columns:].any():
        raise FormatError(f"a bit lies outside the shape {info.rows} by {info.cols}")
    if info.kind == "bitmap_i8":
        sums = _spread(views).sum(axis=(2, 3), dtype=np.int32).reshape(-1)
        if not np.array_equal(views.sums, sums):
            raise FormatError("the row sums do not fit the values; it is corrupt")
    return info

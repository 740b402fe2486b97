"""The kernel blob: a packed weight as one contiguous uint8 array that the kernels read in place.

Layout (little-endian): a 64-byte header, then three sections, each aligned to 64 bytes:
row offsets uint32 [blocks·rows + 1], columns uint16 [nnz], values float32 [nnz]. The columns of
the weight are cut into blocks of `block` columns; non-zeros are ordered by (block, row, column),
and a stored column counts from the start of its block. Bitmap blobs have a layout of their own: see
`bitmap`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.formats import FORMATS, Packed
from prunus.formats.csr import MAX_NONZEROS, check_compressed
from prunus.formats.packed import matrix_shape
from prunus.formats.table import check
from prunus.kernels import bitmap, header
from prunus.kernels.header import MAX_SIDE, BlobInfo
from prunus.kernels.header import align as _align

MAGIC = header.MAGIC
VERSION = header.VERSION
CSR_F32 = header.NUMBERS["csr_f32"]
MAX_BLOCK = 1 << 16
# Measured on Zen 5 with 1024 to 2048 columns: blocks of 256 to 512 columns gain a tenth at 90%
# sparsity and 64 or more columns of X, lose at 95%, and cost a matrix-vector product a sixth.
DEFAULT_BLOCK = MAX_BLOCK


@dataclass(frozen=True)
class Sections:
    """Views of a blob: row offsets [blocks·rows + 1], columns [nnz], values [nnz]."""

    info: BlobInfo
    offsets: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def rows_and_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column (int64) of every stored value, in storage order."""
        info = self.info
        segments = np.repeat(np.arange(info.blocks * info.rows), np.diff(self.offsets.astype("i8")))
        rows = segments % max(info.rows, 1)
        return rows, self.columns + (segments // max(info.rows, 1)) * info.block


def pack(
    weight: Packed | np.ndarray, block: int | None = None, kind: str = "csr_f32"
) -> np.ndarray:
    """Pack a weight [rows, ...] (its 2-d view [rows, -1]) into a blob, 64-byte aligned uint8.

    weight: float32, or float16 and bfloat16 (Packed), which widen exactly. block: columns per
    block of csr_f32, 1 to 65536; None is the fastest on average. kind: csr_f32, bitmap_f32,
    bitmap_bf16 or bitmap_i8 (one scale per row); the last two round. Raises ShapeError,
    ValueRangeError and FormatError.
    """
    if isinstance(weight, Packed):
        shape, rows, columns, values = _from_packed(weight)
    else:
        if weight.ndim < 2:
            raise ShapeError(f"a weight of shape {list(weight.shape)} is not a matrix")
        shape = matrix_shape(weight.shape)
        matrix = _widen(weight, weight.dtype.name).reshape(shape)
        rows, columns = np.nonzero(matrix)
        values = matrix[rows, columns]
    if kind == "csr_f32":
        return assemble(shape, rows, columns, values, block)
    if kind not in bitmap.STORAGE or block is not None:
        known = ", ".join(header.NUMBERS)
        raise ValueRangeError(f"kind {kind!r} with block={block}; kinds: {known}, blocks: csr_f32")
    matrix = np.zeros(shape, np.float32)
    matrix[rows, columns] = values
    return bitmap.pack(matrix, kind)


def _from_packed(weight: Packed) -> tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray]:
    check(weight)
    shape = matrix_shape(weight.shape)
    if weight.format == "csr":
        counts = np.diff(weight.parts["row_offsets"].astype(np.int64))
        rows = np.repeat(np.arange(shape[0]), counts)
        return shape, rows, weight.parts["columns"], _widen(weight.parts["values"], weight.dtype)
    dense = FORMATS[weight.format].decode(weight.parts, weight.shape)
    matrix = _widen(dense, weight.dtype).reshape(shape)
    rows, columns = np.nonzero(matrix)
    return shape, rows, columns, matrix[rows, columns]


def _widen(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("float32", "float16"):
        raise ValueRangeError(
            f"kernels take float32, float16 and bfloat16 weights, not {dtype}; convert it first"
        )
    return np.asarray(values, np.float32)


def assemble(
    shape: tuple[int, int],
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    block: int | None = None,
) -> np.ndarray:
    """A blob from coordinates sorted by (row, column), without duplicates."""
    if max(shape) > MAX_SIDE or len(values) > MAX_NONZEROS:
        raise ShapeError(f"shape {list(shape)} with {len(values)} non-zeros exceeds 32-bit offsets")
    block = DEFAULT_BLOCK if block is None else block
    if not 1 <= block <= MAX_BLOCK:
        raise ValueRangeError(f"block {block} is not within 1 to {MAX_BLOCK}")
    blocks = max(1, -(-shape[1] // block))
    segments, columns = rows.astype(np.int64), columns.astype(np.int64)
    if blocks > 1:
        segments = (columns // block) * shape[0] + segments
        order = np.argsort(segments, kind="stable")
        segments, columns, values = segments[order], columns[order], values[order]
    blob = new_blob(shape, len(values), block)
    views = _csr_sections(blob, info(blob))
    counts = np.bincount(segments, minlength=blocks * shape[0])
    views.offsets[1:] = np.cumsum(counts)
    views.columns[:] = columns % block
    views.values[:] = values
    return blob


def _places(rows: int, blocks: int, nnz: int) -> tuple[int, int, int, int]:
    """Byte offsets of the three sections, and the end."""
    offsets = header.HEADER.size
    columns = _align(offsets + 4 * (blocks * rows + 1))
    values = _align(columns + 2 * nnz)
    return offsets, columns, values, _align(values + 4 * nnz)


def blob_bytes(head: BlobInfo) -> int:
    """Length of a blob with this header, in bytes."""
    if head.kind != "csr_f32":
        return bitmap.nbytes(head)
    return _places(head.rows, head.blocks, head.nnz)[3]


def new_blob(shape: tuple[int, int], nnz: int, block: int) -> np.ndarray:
    """A blob of zeros with a finished header; the sections are still to be filled."""
    blocks = max(1, -(-shape[1] // block))
    *places, end = _places(shape[0], blocks, nnz)
    held = BlobInfo("csr_f32", VERSION, *shape, nnz, block, blocks, end)
    return header.allocate(held, places)


def info(blob: np.ndarray) -> BlobInfo:
    """The header of a blob, checked against the blob's length; FormatError if it is wrong."""
    held, places = header.read(blob)
    if held.kind != "csr_f32":
        return bitmap.check_header(held, places)
    rows, cols, nnz = held.rows, held.cols, held.nnz
    block, blocks = held.block, held.blocks
    if max(rows, cols) > MAX_SIDE or nnz > MAX_NONZEROS or not 1 <= block <= MAX_BLOCK:
        raise FormatError(f"blob of {rows} by {cols}, {nnz} non-zeros, block {block}: out of range")
    if blocks != max(1, -(-cols // block)):
        raise FormatError(f"blob claims {blocks} blocks of {block} for {cols} columns")
    *wanted, end = _places(rows, blocks, nnz)
    if places != wanted or end != len(blob):
        raise FormatError(f"blob sections do not match its {len(blob)} bytes; it is corrupt")
    return held


def sections(blob: np.ndarray) -> Sections | bitmap.BitmapSections:
    """Views of a blob's sections; the header is checked, the contents are not (see validate)."""
    head = info(blob)
    return _csr_sections(blob, head) if head.kind == "csr_f32" else bitmap.sections(blob)


def _csr_sections(blob: np.ndarray, head: BlobInfo) -> Sections:
    at_offsets, at_columns, at_values, _ = _places(head.rows, head.blocks, head.nnz)
    return Sections(
        head,
        blob[at_offsets : at_offsets + 4 * (head.blocks * head.rows + 1)].view("<u4"),
        blob[at_columns : at_columns + 2 * head.nnz].view("<u2"),
        blob[at_values : at_values + 4 * head.nnz].view("<f4"),
    )


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless every offset and column is in bounds; call once before the kernels run."""
    head = info(blob)
    if head.kind != "csr_f32":
        return bitmap.validate(blob)
    views = _csr_sections(blob, head)
    check_compressed(views.offsets, views.columns, head.block)
    last = views.columns[int(views.offsets[(head.blocks - 1) * head.rows]) :]
    width = head.cols - (head.blocks - 1) * head.block
    if len(last) and int(last.max()) >= width:
        raise FormatError(f"a column of the last block lies outside its width {width}")
    return head


def unpack(blob: np.ndarray) -> np.ndarray:
    """Dense float32 [rows, cols] of a blob; FormatError if the blob is corrupt."""
    head = validate(blob)
    try:
        if head.kind != "csr_f32":
            return bitmap.dense(blob)
        out = np.zeros((head.rows, head.cols), np.float32)
    except (MemoryError, ValueError) as error:
        raise FormatError(
            f"a dense {head.rows} by {head.cols} matrix does not fit into memory"
        ) from error
    views = _csr_sections(blob, head)
    out[views.rows_and_columns()] = views.values
    return out

"""The kernel blob: a packed weight as one contiguous uint8 array that the kernels read in place.

Layout (little-endian): a 64-byte header, then three sections, each aligned to 64 bytes:
row offsets uint32 [blocks·rows + 1], columns uint16 [nnz], values float32 [nnz]. The columns of
the weight are cut into blocks of `block` columns; non-zeros are ordered by (block, row, column),
and a stored column counts from the start of its block. A tiled blob orders them for products
with many columns, and its first section differs; see `tiles`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.formats import FORMATS, Packed
from prunus.formats.csr import MAX_NONZEROS, check_compressed
from prunus.formats.packed import matrix_shape
from prunus.formats.table import check
from prunus.kernels import tiles

MAGIC = b"PRBK"
VERSION = 1
CSR_F32, TILED_F32 = 1, 8
KINDS = {CSR_F32: "csr_f32", TILED_F32: "tiled_f32"}
LAYOUTS = ("csr", "tiled")
MAX_SIDE = (1 << 31) - 1
MAX_BLOCK = 1 << 16
# Measured on Zen 5 with 1024 to 2048 columns: blocks of 256 to 512 columns gain a tenth at 90%
# sparsity and 64 or more columns of X, lose at 95%, and cost a matrix-vector product a sixth.
DEFAULT_BLOCK = MAX_BLOCK
_HEADER = struct.Struct("<4sHHQQQIIQQQ")


@dataclass(frozen=True)
class BlobInfo:
    """What a blob's header says; `block` is the number of columns per block."""

    kind: str
    version: int
    rows: int
    cols: int
    nnz: int
    block: int
    blocks: int
    nbytes: int

    @property
    def tiled(self) -> bool:
        """Whether rows are in tiles; see `tile`."""
        return self.kind == KINDS[TILED_F32]


@dataclass(frozen=True)
class Sections:
    """Views of a blob: row offsets [blocks·rows + 1] (or as `tiles`), columns, values [nnz]."""

    info: BlobInfo
    offsets: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def rows_and_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column (int64) of every stored value, in storage order."""
        info = self.info
        if info.tiled:
            shape = (info.rows, info.cols)
            return tiles.coordinates(shape, self.offsets, self.columns, info.block)
        segments = np.repeat(np.arange(info.blocks * info.rows), np.diff(self.offsets.astype("i8")))
        rows = segments % max(info.rows, 1)
        return rows, self.columns + (segments // max(info.rows, 1)) * info.block


def pack(weight: Packed | np.ndarray, block: int | None = None, layout: str = "csr") -> np.ndarray:
    """Pack a weight [rows, ...] (its 2-d view [rows, -1]) into a blob, 64-byte aligned uint8.

    weight: float32, or float16 and bfloat16 (Packed), which widen exactly. block: columns per
    block, 1 to 65536; None is the fastest on average. layout: "csr", or "tiled" for products with
    16 or more columns (see `tile`). Raises ShapeError, ValueRangeError and FormatError.
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
    return assemble(shape, rows, columns, values, block, layout)


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
    layout: str = "csr",
) -> np.ndarray:
    """A blob from coordinates sorted by (row, column), without duplicates."""
    if max(shape) > MAX_SIDE or len(values) > MAX_NONZEROS:
        raise ShapeError(f"shape {list(shape)} with {len(values)} non-zeros exceeds 32-bit offsets")
    if layout not in LAYOUTS:
        raise ValueRangeError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    tiled = layout == "tiled"
    if block is None:
        block = tiles.usual_block(shape, len(values)) if tiled else DEFAULT_BLOCK
    most = tiles.MAX_BLOCK if tiled else MAX_BLOCK
    if not 1 <= block <= most:
        raise ValueRangeError(f"block {block} is not within 1 to {most}")
    blocks = max(1, -(-shape[1] // block))
    segments, columns = rows.astype(np.int64), columns.astype(np.int64)
    if tiled:
        blob = new_blob(shape, len(values), block, tiled=True)
        views = sections(blob)
        views.offsets[:], order = tiles.arrange(shape, segments, columns, block)
        views.columns[:], views.values[:] = columns[order] % block, values[order]
        return blob
    if blocks > 1:
        segments = (columns // block) * shape[0] + segments
        order = np.argsort(segments, kind="stable")
        segments, columns, values = segments[order], columns[order], values[order]
    blob = new_blob(shape, len(values), block)
    views = sections(blob)
    counts = np.bincount(segments, minlength=blocks * shape[0])
    views.offsets[1:] = np.cumsum(counts)
    views.columns[:] = columns % block
    views.values[:] = values
    return blob


def tile(blob: np.ndarray, block: int | None = None) -> np.ndarray:
    """The same weight in tiles, for products with 16 or more columns; None is the usual block.

    The kernels take it wherever they take the blob, but for convolutions and gradients.
    """
    views = sections(blob)
    rows, columns = views.rows_and_columns()
    order = np.lexsort((columns, rows))
    shape = (views.info.rows, views.info.cols)
    return assemble(shape, rows[order], columns[order], views.values[order], block, "tiled")


def _indices(rows: int, blocks: int, tiled: bool) -> int:
    """Length of the first section."""
    return blocks * rows + (tiles.tile_count(rows) if tiled else 0) + 1


def _places(rows: int, blocks: int, nnz: int, tiled: bool) -> tuple[int, int, int, int]:
    """Byte offsets of the three sections, and the end."""
    offsets = _HEADER.size
    columns = _align(offsets + 4 * _indices(rows, blocks, tiled))
    values = _align(columns + 2 * nnz)
    return offsets, columns, values, _align(values + 4 * nnz)


def blob_bytes(header: np.ndarray) -> int:
    """Length in bytes of the blob that begins with this header of 64 bytes."""
    _, _, kind, rows, _, nnz, _, blocks, *_ = _HEADER.unpack(header.tobytes())
    return _places(rows, blocks, nnz, kind == TILED_F32)[3]


def _align(position: int) -> int:
    return (position + 63) // 64 * 64


def new_blob(shape: tuple[int, int], nnz: int, block: int, *, tiled: bool = False) -> np.ndarray:
    """A blob of zeros with a finished header; the sections are still to be filled."""
    blocks = max(1, -(-shape[1] // block))
    *places, end = _places(shape[0], blocks, nnz, tiled)
    raw = np.zeros(end + 63, np.uint8)
    start = -raw.ctypes.data % 64
    blob = raw[start : start + end]
    kind = TILED_F32 if tiled else CSR_F32
    header = _HEADER.pack(MAGIC, VERSION, kind, *shape, nnz, block, blocks, *places)
    blob[: _HEADER.size] = np.frombuffer(header, np.uint8)
    return blob


def info(blob: np.ndarray) -> BlobInfo:
    """The header of a blob, checked against the blob's length; FormatError if it is wrong."""
    if blob.dtype != np.uint8 or blob.ndim != 1 or not blob.flags.c_contiguous:
        raise FormatError(f"a blob is a contiguous uint8 vector, not {blob.dtype} {blob.shape}")
    if len(blob) < _HEADER.size:
        raise FormatError(f"a blob of {len(blob)} bytes has no header; pack the weight again")
    fields = _HEADER.unpack(blob[: _HEADER.size].tobytes())
    magic, version, kind, rows, cols, nnz, block, blocks, *places = fields
    if magic != MAGIC:
        raise FormatError("not a kernel blob: the magic bytes are wrong")
    if version != VERSION or kind not in KINDS:
        raise FormatError(
            f"blob version {version}, kind {kind}: this prunus reads version {VERSION}, kinds "
            f"{KINDS}; pack the weight again"
        )
    if max(rows, cols) > MAX_SIDE or nnz > MAX_NONZEROS or not 1 <= block <= MAX_BLOCK:
        raise FormatError(f"blob of {rows} by {cols}, {nnz} non-zeros, block {block}: out of range")
    if blocks != max(1, -(-cols // block)):
        raise FormatError(f"blob claims {blocks} blocks of {block} for {cols} columns")
    tiled = kind == TILED_F32
    if tiled and block > tiles.MAX_BLOCK:
        raise FormatError(f"blocks of {block} columns do not fit into tiles")
    *wanted, end = _places(rows, blocks, nnz, tiled)
    if places != wanted or end != len(blob):
        raise FormatError(f"blob sections do not match its {len(blob)} bytes; it is corrupt")
    return BlobInfo(KINDS[kind], version, rows, cols, nnz, block, blocks, len(blob))


def sections(blob: np.ndarray) -> Sections:
    """Views of a blob's sections; the header is checked, the contents are not (see validate)."""
    head = info(blob)
    at_offsets, at_columns, at_values, _ = _places(head.rows, head.blocks, head.nnz, head.tiled)
    indices = _indices(head.rows, head.blocks, head.tiled)
    return Sections(
        head,
        blob[at_offsets : at_offsets + 4 * indices].view("<u4"),
        blob[at_columns : at_columns + 2 * head.nnz].view("<u2"),
        blob[at_values : at_values + 4 * head.nnz].view("<f4"),
    )


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless every offset and column is in bounds; call once before the kernels run."""
    views = sections(blob)
    head = views.info
    if head.tiled:
        tiles.check((head.rows, head.cols), views.offsets, views.columns, head.block)
        return head
    check_compressed(views.offsets, views.columns, head.block)
    last = views.columns[int(views.offsets[(head.blocks - 1) * head.rows]) :]
    width = head.cols - (head.blocks - 1) * head.block
    if len(last) and int(last.max()) >= width:
        raise FormatError(f"a column of the last block lies outside its width {width}")
    return head


def unpack(blob: np.ndarray) -> np.ndarray:
    """Dense float32 [rows, cols] of a blob; FormatError if the blob is corrupt."""
    validate(blob)
    views = sections(blob)
    try:
        out = np.zeros((views.info.rows, views.info.cols), np.float32)
    except (MemoryError, ValueError) as error:
        raise FormatError(
            f"a dense {views.info.rows} by {views.info.cols} matrix does not fit into memory"
        ) from error
    out[views.rows_and_columns()] = views.values
    return out

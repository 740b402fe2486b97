"""The 64-byte header that all kernel blobs start with, and memory aligned for them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from prunus.errors import FormatError

MAGIC = b"PRBK"
VERSION = 1
HEADER = struct.Struct("<4sHHQQQIIQQQ")
KINDS = {1: "csr_f32", 16: "bitmap_f32", 17: "bitmap_bf16", 18: "bitmap_i8"}
NUMBERS = {name: number for number, name in KINDS.items()}
MAX_SIDE = (1 << 31) - 1


@dataclass(frozen=True)
class BlobInfo:
    """What a blob's header says; `block` is the columns per block, of a bitmap rows per group.

    height: rows that share their columns; permuted: whether the rows are stored in another order.
    """

    kind: str
    version: int
    rows: int
    cols: int
    nnz: int
    block: int
    blocks: int
    nbytes: int
    height: int = 1
    permuted: bool = False


def align(position: int) -> int:
    """The next multiple of 64."""
    return (position + 63) // 64 * 64


def read(blob: np.ndarray) -> tuple[BlobInfo, list[int]]:
    """(header, byte offsets of three sections), their ranges unchecked; FormatError if foreign."""
    if blob.dtype != np.uint8 or blob.ndim != 1 or not blob.flags.c_contiguous:
        raise FormatError(f"a blob is a contiguous uint8 vector, not {blob.dtype} {blob.shape}")
    if len(blob) < HEADER.size:
        raise FormatError(f"a blob of {len(blob)} bytes has no header; pack the weight again")
    fields = HEADER.unpack(blob[: HEADER.size].tobytes())
    magic, version, kind, rows, cols, nnz, block, blocks, *places = fields
    if magic != MAGIC:
        raise FormatError("not a kernel blob: the magic bytes are wrong")
    if version != VERSION or kind not in KINDS:
        raise FormatError(
            f"blob version {version}, kind {kind}: this prunus reads version {VERSION}, kinds "
            f"{', '.join(f'{number} ({name})' for number, name in KINDS.items())}; pack the "
            f"weight again"
        )
    held = BlobInfo(KINDS[kind], version, rows, cols, nnz, block, blocks, len(blob))
    return held, list(places)


def allocate(info: BlobInfo, places: list[int]) -> np.ndarray:
    """Zeros of info.nbytes, 64-byte aligned, behind a finished header."""
    raw = np.zeros(info.nbytes + 63, np.uint8)
    start = -raw.ctypes.data % 64
    blob = raw[start : start + info.nbytes]
    numbers = (info.rows, info.cols, info.nnz, info.block, info.blocks)
    header = HEADER.pack(MAGIC, VERSION, NUMBERS[info.kind], *numbers, *places)
    blob[: HEADER.size] = np.frombuffer(header, np.uint8)
    return blob

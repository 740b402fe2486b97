"""Blobs of n:m weights: in each window of 16 columns a row keeps at most 8, as 2:4, 1:4 or 4:8 do.

Layout (little-endian): the 64-byte header, whose block is the slots of a row in a window and whose
blocks are groups of 16 rows; picks; values; both aligned to 64 bytes. A slot holds a value and its
column within the window, 4 bits; a row that keeps fewer ends in slots of zero, column 0. float32:
values [group, window, slot, 16]; the picks of a slot uint64, that of row r in bits
32 (r % 2) + 4 (r / 2). bfloat16, of an even number of slots: values [group, window, pair, 16, 2];
the picks of a pair 128 bits, that of row 4 q + i and slot s in bits 32 i + 16 s + 4 q.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels.header import HEADER, MAGIC, MAX_SIDE, VERSION, BlobInfo, align
from prunus.kernels.vector_values import from_bf16, to_bf16

ROWS = 16
WINDOW = 16
MOST_SLOTS = 8
NAMES = {40: "nm_f32", 41: "nm_bf16"}
DTYPES = {"float32": 40, "bfloat16": 41}
STORED = {40: np.dtype("<f4"), 41: np.dtype("<u2")}
_CHUNK = 1 << 22  # positions of a weight that are arranged at a time


@dataclass(frozen=True)
class Windows:
    """Views of a blob: picks and values as they are stored."""

    info: BlobInfo
    picks: np.ndarray
    values: np.ndarray

    def slots(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first group, columns, raw values), each [groups, windows, 16, slots], piece by piece."""
        info = self.info
        windows, step = _windows(info.cols), _step(info.cols)
        half = info.kind == "nm_bf16"
        shape = (info.blocks, windows, info.block)
        picks = self.picks.reshape(shape)
        values = self.values.reshape(*shape, ROWS)
        for first in range(0, info.blocks, step):
            part = slice(first, first + step)
            raw = values[part]
            if half:
                raw = raw.reshape(*raw.shape[:2], info.block // 2, ROWS, 2).transpose(0, 1, 3, 2, 4)
                raw = raw.reshape(*raw.shape[:3], info.block)
            else:
                raw = raw.transpose(0, 1, 3, 2)
            yield first, _spread_picks(picks[part], half), raw

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, column, value) of every value that is not zero."""
        found = []
        for first, picks, raw in self.slots():
            kept = _real(raw)
            group, window, row, _ = np.nonzero(kept)
            value = from_bf16(raw[kept]) if self.info.kind == "nm_bf16" else raw[kept]
            found.append(((first + group) * ROWS + row, window * WINDOW + picks[kept], value))
        none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        rows, columns, values = zip(*(found or [none]), strict=True)
        return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)


def window_slots(weight: np.ndarray) -> tuple[int, float]:
    """(most non-zeros of a row in a window of 16 columns, share of non-zeros in so many slots)."""
    matrix = weight.reshape(len(weight), -1) if weight.size else np.zeros((0, 0), np.float32)
    most, kept = 0, 0
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    for first in range(0, len(matrix), step):
        mask = matrix[first : first + step] != 0
        mask = np.pad(mask, ((0, 0), (0, -mask.shape[1] % WINDOW)))
        counts = np.count_nonzero(mask.reshape(len(mask), -1, WINDOW), axis=2)
        most = max(most, int(counts.max(initial=0)))
        kept += int(counts.sum())
    places = most * len(matrix) * matrix.shape[1] / WINDOW
    return most, min(1.0, kept / places) if places else 0.0


def pack_nm(weight: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """Blob of a float32 weight [rows, ...] that keeps at most 8 of any 16 aligned columns of a row.

    dtype: of the stored values; "float32", or "bfloat16" (rounded to nearest; X is rounded, too,
    sums are fp32). Only stored values contribute. Raises ShapeError and ValueRangeError.
    """
    if weight.ndim < 2 or weight.dtype != np.float32:
        raise ShapeError(f"a weight {weight.dtype} {list(weight.shape)} is no float32 matrix")
    if dtype not in DTYPES:
        raise ValueRangeError(f"n:m weights in {dtype}: types are {', '.join(DTYPES)}")
    shape = (weight.shape[0], int(np.prod(weight.shape[1:], dtype=np.int64)))
    if max(shape) > MAX_SIDE:
        raise ShapeError(f"a weight of {shape[0]} by {shape[1]} is out of range")
    matrix = weight.reshape(shape)
    slots, _ = window_slots(matrix)
    if slots > MOST_SLOTS:
        raise ShapeError(
            f"a row keeps {slots} of {WINDOW} neighbouring columns; n:m kernels take up to "
            f"{MOST_SLOTS}, use kernels.pack"
        )
    kind = DTYPES[dtype]
    half = kind == 41
    slots = max(2, slots + slots % 2) if half else max(1, slots)
    info = BlobInfo(NAMES[kind], VERSION, *shape, 0, slots, -(-shape[0] // ROWS), 0)
    blob = _new_blob(info, kind)
    views = windows(blob)
    nonzeros, step = 0, _step(shape[1])
    held = (views.info.blocks, _windows(shape[1]), slots)
    for first in range(0, views.info.blocks, step):
        part = slice(first, first + step)
        picks, values = _arranged(matrix[first * ROWS : (first + step) * ROWS], slots, half)
        nonzeros += int(np.count_nonzero(_real(values)))
        views.picks.reshape(held)[part] = _joined_picks(picks, half)
        if half:
            values = values.reshape(*values.shape[:3], slots // 2, 2).swapaxes(2, 3)
            views.values.reshape(*held[:2], slots // 2, ROWS, 2)[part] = values
        else:
            views.values.reshape(*held, ROWS)[part] = values.swapaxes(2, 3)
    blob[24:32] = np.frombuffer(np.uint64(nonzeros).tobytes(), np.uint8)
    return blob


def _arranged(matrix: np.ndarray, slots: int, half: bool) -> tuple[np.ndarray, np.ndarray]:
    """Columns and stored values of whole groups of rows, each [groups, windows, 16, slots]."""
    rows, cols = matrix.shape
    padded = np.zeros((-(-rows // ROWS) * ROWS, _windows(cols) * WINDOW), np.float32)
    padded[:rows, :cols] = matrix
    stored = to_bf16(padded) if half else padded
    tiles = stored.reshape(len(padded) // ROWS, ROWS, _windows(cols), WINDOW).swapaxes(1, 2)
    real = _real(tiles)
    picks = np.argsort(~real, axis=-1, kind="stable")[..., :slots]
    kept = np.take_along_axis(real, picks, axis=-1)
    values = np.take_along_axis(tiles, picks, axis=-1)
    return np.where(kept, picks, 0), np.where(kept, values, values.dtype.type(0))


def _real(values: np.ndarray) -> np.ndarray:
    """Which stored values are not zero; -0.0 is."""
    return (values << 1 if values.dtype == np.uint16 else values) != 0


def _bits(half: bool) -> tuple[np.ndarray, np.ndarray]:
    """(word, bit) of the pick of every [slot of a pair, row]; of every row in float32."""
    row = np.arange(ROWS)
    if not half:
        return np.zeros(ROWS, np.int64), 32 * (row % 2) + 4 * (row // 2)
    slot = np.arange(2)[:, None]
    return np.broadcast_to(row % 4 // 2, (2, ROWS)), 32 * (row % 2) + 16 * slot + 4 * (row // 4)


def _joined_picks(picks: np.ndarray, half: bool) -> np.ndarray:
    """uint64 [groups, windows, slots] of columns [groups, windows, 16, slots]."""
    columns = picks.swapaxes(2, 3).astype(np.uint64)
    word, bit = _bits(half)
    if not half:
        return np.bitwise_or.reduce(columns << bit.astype(np.uint64), axis=-1)
    columns = columns.reshape(*columns.shape[:2], columns.shape[2] // 2, 2, ROWS) << bit.astype(
        np.uint64
    )
    words = [
        np.bitwise_or.reduce(np.where(word == at, columns, np.uint64(0)), axis=(-2, -1))
        for at in (0, 1)
    ]
    return np.stack(words, axis=-1).reshape(*picks.shape[:2], picks.shape[3])


def _spread_picks(words: np.ndarray, half: bool) -> np.ndarray:
    """Columns [groups, windows, 16, slots] of uint64 [groups, windows, slots]."""
    word, bit = _bits(half)
    if half:
        pairs = words.reshape(*words.shape[:2], words.shape[2] // 2, 2)
        picks = (pairs[..., word] >> bit.astype(np.uint64) & np.uint64(15)).astype(np.int64)
        picks = picks.reshape(*words.shape, ROWS)
    else:
        picks = (words[..., None] >> bit.astype(np.uint64) & np.uint64(15)).astype(np.int64)
    return picks.swapaxes(2, 3)


def _windows(cols: int) -> int:
    return -(-cols // WINDOW)


def _step(cols: int) -> int:
    """Groups whose positions are arranged at a time."""
    return max(1, _CHUNK // (ROWS * WINDOW * max(1, _windows(cols))))


def _places(info: BlobInfo, kind: int) -> tuple[int, int, int]:
    """Byte offsets of picks and values, and the end."""
    count = info.blocks * _windows(info.cols) * info.block
    values = align(HEADER.size + 8 * count)
    return HEADER.size, values, align(values + STORED[kind].itemsize * count * ROWS)


def _new_blob(info: BlobInfo, kind: int) -> np.ndarray:
    """A 64-byte aligned blob of zeros with a finished header."""
    picks, values, end = _places(info, kind)
    raw = np.zeros(end + 63, np.uint8)
    start = -raw.ctypes.data % 64
    blob = raw[start : start + end]
    numbers = (info.rows, info.cols, info.nnz, info.block, info.blocks)
    head = HEADER.pack(MAGIC, VERSION, kind, *numbers, picks, picks, values)
    blob[: HEADER.size] = np.frombuffer(head, np.uint8)
    return blob


def _read(head: bytes) -> tuple[BlobInfo, int, list[int]]:
    """(header, kind, byte offsets), unchecked."""
    _, version, kind, *numbers = HEADER.unpack(head)
    rows, cols, nnz, slots, groups, *places = numbers
    name = NAMES.get(kind, "")
    return BlobInfo(name, version, rows, cols, nnz, slots, groups, 0), kind, places


def length(head: bytes) -> int:
    """Bytes of the blob that begins with this header."""
    info, kind, _ = _read(head)
    return _places(info, kind)[-1]


def info(blob: np.ndarray) -> BlobInfo:
    """The header, checked against the blob's length; FormatError if it is wrong."""
    head, kind, places = _read(blob[: HEADER.size].tobytes())
    if head.version != VERSION or not head.kind:
        raise FormatError(f"blob version {head.version}, kind {kind} is unknown; pack it again")
    multiple = 2 if kind == 41 else 1
    slots, groups = head.block, head.blocks
    if max(head.rows, head.cols) > MAX_SIDE or groups != -(-head.rows // ROWS):
        raise FormatError(f"blob of {head.rows} by {head.cols} in {groups} groups: out of range")
    if not 1 <= slots <= MOST_SLOTS or slots % multiple:
        raise FormatError(f"blob of {slots} slots in a window: out of range")
    picks, values, end = _places(head, kind)
    if places != [picks, picks, values] or end != len(blob):
        raise FormatError(f"blob sections do not match its {len(blob)} bytes; it is corrupt")
    numbers = (head.rows, head.cols, head.nnz, slots, groups)
    return BlobInfo(head.kind, VERSION, *numbers, len(blob))


def windows(blob: np.ndarray) -> Windows:
    """Views of a blob's sections; the header is checked, the contents are not (see validate)."""
    head = info(blob)
    kind = next(number for number, name in NAMES.items() if name == head.kind)
    count = head.blocks * _windows(head.cols) * head.block
    picks, values, _ = _places(head, kind)
    size = STORED[kind].itemsize * count * ROWS
    return Windows(
        head,
        blob[picks : picks + 8 * count].view("<u8"),
        blob[values : values + size].view(STORED[kind]),
    )


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless every value has a place of its own within the shape."""
    views = windows(blob)
    head, nonzeros = views.info, 0
    for first, picks, raw in views.slots():
        real = _real(raw)
        nonzeros += int(np.count_nonzero(real))
        rising = (picks[..., 1:] > picks[..., :-1]) | ~real[..., 1:]
        if not rising.all() or (real[..., 1:] & ~real[..., :-1]).any() or picks[~real].any():
            raise FormatError("the columns of a window do not rise; the blob is corrupt")
        rows = (first + np.arange(len(picks)))[:, None] * ROWS + np.arange(ROWS)
        columns = np.arange(picks.shape[1])[:, None, None] * WINDOW + picks
        outside = (columns >= head.cols) | (rows >= head.rows)[:, None, :, None]
        if (real & outside).any():
            raise FormatError(f"a value lies outside {head.rows} by {head.cols}; it is corrupt")
    if nonzeros != head.nnz:
        raise FormatError(f"the header claims {head.nnz} non-zeros, there are {nonzeros}")
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
    rows, columns, values = windows(blob).entries()
    out[rows, columns] = values
    return out

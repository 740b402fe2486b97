"""The table of formats, and pack and unpack over it. A new format is one file and one row."""

from __future__ import annotations

import numpy as np

from prunus.errors import FormatError, ValueRangeError
from prunus.formats.bitmap import BITMAP
from prunus.formats.csr import CSR, MAX_NONZEROS, MAX_WIDTH
from prunus.formats.dense import DENSE
from prunus.formats.dtypes import lookup, nonzero_mask, to_storage, without_negative_zeros
from prunus.formats.packed import Format, Packed, matrix_shape
from prunus.formats.vector import VECTOR

# What a format that version 1 of the file lacks must come to, in sizes of the best other one.
WORTH = 0.9
# In order of preference where sizes tie.
FORMATS: dict[str, Format] = {row.name: row for row in (DENSE, BITMAP, CSR, VECTOR)}


def pack(array: np.ndarray, format: str = "auto", dtype: str | None = None) -> Packed:
    """Pack an array; "auto" takes the smallest format, dense for ties and for 0-d and 1-d.

    Vectors have to be smaller by a tenth, as older readers do not know them.

    array: any shape; bfloat16 as uint16 bit patterns with dtype="bfloat16".
    A dense part may share memory with the array that was given.
    -0.0 counts as zero and comes back as +0.0 from every format; NaN and infinity are values.
    Raises ValueRangeError for an unknown format or dtype, ShapeError beyond csr's 32 bits.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueRangeError(f"format {format!r} is unknown; use auto, {', '.join(FORMATS)}")
    stored, name = to_storage(np.asarray(array), dtype)
    stored = without_negative_zeros(stored, name)
    keep = nonzero_mask(stored, name)
    if format == "auto":
        format = _smallest(stored.shape, keep, lookup(name).bits)
    return Packed(format, stored.shape, name, FORMATS[format].encode(stored, keep))


def _smallest(shape: tuple[int, ...], keep: np.ndarray, bits: int) -> str:
    """Name of the smallest format in bytes for this mask and value width."""
    nonzeros = int(np.count_nonzero(keep))
    best = smallest(shape, nonzeros, bits)
    least = FORMATS[best].size(shape, nonzeros, bits) * WORTH
    for row in FORMATS.values():
        # The least possible size first: most masks need no look at their places.
        if len(shape) > 1 and row.size_of is not None and row.size(shape, nonzeros, bits) < least:
            found = row.size_of(shape, keep, bits)
            best, least = (row.name, found) if found < least else (best, least)
    return best


def smallest(shape: tuple[int, ...], nonzeros: int, bits: int) -> str:
    """Name of the smallest format in bytes for this shape, non-zero count and value width.

    Of those whose size does not depend on where the non-zeros are.
    """
    if len(shape) < 2:
        return DENSE.name
    in_32_bits = nonzeros <= MAX_NONZEROS and matrix_shape(shape)[1] <= MAX_WIDTH
    free = [row for row in FORMATS.values() if row.size_of is None]
    fitting = [row for row in free if row is not CSR or in_32_bits]
    return min(fitting, key=lambda row: row.size(shape, nonzeros, bits)).name


def unpack(packed: Packed) -> np.ndarray:
    """The tensor as a new writable array (bfloat16 as uint16); FormatError if parts are wrong."""
    check(packed)
    return FORMATS[packed.format].decode(packed.parts, packed.shape)


def check(packed: Packed) -> None:
    """FormatError unless the parts fit the format, shape and dtype and are safe to decode."""
    if packed.format not in FORMATS:
        raise FormatError(f"format {packed.format!r} is unknown; known: {', '.join(FORMATS)}")
    if "values" not in packed.parts:
        raise FormatError(f"a {packed.format} tensor without its part 'values'")
    FORMATS[packed.format].check(packed.parts, packed.shape, lookup(packed.dtype).storage)

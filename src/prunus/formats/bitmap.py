"""bitmap: one bit per element in C order, low bit first, and the kept values."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from prunus.errors import FormatError
from prunus.formats import sizes
from prunus.formats.packed import Format, Parts, Shape, allocate, expect_parts, stored_count


def _encode(array: np.ndarray, keep: np.ndarray) -> Parts:
    return {"values": array[keep], "bitmap": np.packbits(keep, bitorder="little")}


def _check(parts: Mapping[str, np.ndarray], shape: Shape, storage: np.dtype) -> None:
    count, stored = math.prod(shape), stored_count(parts)
    spec = {"values": (storage.str, (stored,)), "bitmap": ("u1", (-(-count // 8),))}
    expect_parts(parts, spec)
    bits = np.unpackbits(parts["bitmap"], bitorder="little")
    if bits[count:].any():
        raise FormatError("padding bits after the last element are set; the bitmap is corrupt")
    kept = int(bits.sum(dtype=np.int64))
    if kept != stored:
        raise FormatError(f"the bitmap keeps {kept} elements, {stored} are stored")


def _decode(parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
    out = allocate(shape, parts["values"].dtype)
    keep = np.unpackbits(parts["bitmap"], bitorder="little", count=out.size).view(bool)
    out.reshape(-1)[keep] = parts["values"]
    return out


BITMAP = Format("bitmap", sizes.bitmap_bytes, _encode, _check, _decode)

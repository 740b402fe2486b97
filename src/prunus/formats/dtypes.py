"""The logical dtypes a packed tensor may have, how NumPy stores them, and what counts as zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunus.errors import ValueRangeError


@dataclass(frozen=True)
class DType:
    """One row of the dtype table: logical name, NumPy storage, safetensors tag, float or not."""

    name: str
    storage: np.dtype
    tag: str
    floating: bool = False

    @property
    def bits(self) -> int:
        """Bits per value."""
        return self.storage.itemsize * 8


_ROWS = (
    DType("float64", np.dtype("<f8"), "F64", True),
    DType("float32", np.dtype("<f4"), "F32", True),
    DType("float16", np.dtype("<f2"), "F16", True),
    DType("bfloat16", np.dtype("<u2"), "BF16", True),
    DType("int64", np.dtype("<i8"), "I64"),
    DType("int32", np.dtype("<i4"), "I32"),
    DType("int16", np.dtype("<i2"), "I16"),
    DType("int8", np.dtype("i1"), "I8"),
    DType("uint64", np.dtype("<u8"), "U64"),
    DType("uint32", np.dtype("<u4"), "U32"),
    DType("uint16", np.dtype("<u2"), "U16"),
    DType("uint8", np.dtype("u1"), "U8"),
    DType("bool", np.dtype("?"), "BOOL"),
)
DTYPES: dict[str, DType] = {row.name: row for row in _ROWS}


def lookup(name: str) -> DType:
    """The table row of a logical dtype; ValueRangeError lists the known names."""
    if name not in DTYPES:
        raise ValueRangeError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _bit_patterns(array: np.ndarray) -> np.ndarray:
    return array.view(np.dtype(f"<u{array.dtype.itemsize}"))


def nonzero_mask(array: np.ndarray, dtype: str) -> np.ndarray:
    """Bool array, True where a value is stored: NaN and subnormals are, -0.0 is not."""
    if not lookup(dtype).floating:
        return array != 0
    # Integer arithmetic on the bit patterns does not depend on the thread's flush-to-zero mode.
    return (_bit_patterns(array) << 1) != 0


def without_negative_zeros(array: np.ndarray, dtype: str) -> np.ndarray:
    """The same contiguous array with -0.0 replaced by +0.0; a copy only if there is one."""
    row = lookup(dtype)
    if not row.floating:
        return array
    bits = _bit_patterns(array)
    negative_zero = bits == (1 << (row.bits - 1))
    if not negative_zero.any():
        return array
    return np.where(negative_zero, bits.dtype.type(0), bits).view(array.dtype)


def to_storage(array: np.ndarray, dtype: str | None) -> tuple[np.ndarray, str]:
    """Contiguous little-endian storage and the logical dtype name; never converts values."""
    native = array.dtype.name
    name = native if dtype is None else dtype
    row = lookup(name)
    if native != name and not (name == "bfloat16" and native == "uint16"):
        raise ValueRangeError(
            f"an array of {native} cannot be packed as {name}: pack does not convert; "
            f"convert it first (bfloat16 is given as its uint16 bit patterns)"
        )
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    if native == "bfloat16":
        contiguous = contiguous.view(np.uint16)
    return contiguous.astype(row.storage, copy=False), name

"""dense: every value, zeros included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunus.formats import sizes
from prunus.formats.packed import Format, Parts, Shape, expect_parts


def _encode(array: np.ndarray, keep: np.ndarray) -> Parts:
    return {"values": array}


def _check(parts: Mapping[str, np.ndarray], shape: Shape, storage: np.dtype) -> None:
    expect_parts(parts, {"values": (storage.str, shape)})


def _decode(parts: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
    return np.array(parts["values"])


DENSE = Format("dense", sizes.dense_bytes, _encode, _check, _decode)

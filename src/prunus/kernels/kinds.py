"""All kinds of blobs behind one face: what a module reads of a packed weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunus.kernels import blob as csr
from prunus.kernels import header, nm, vectors
from prunus.kernels.header import BlobInfo


def _kind(blob: np.ndarray) -> int:
    """The kind that the header names; anything odd is 0 and left to the checks of csr."""
    plain = blob.dtype == np.uint8 and blob.ndim == 1 and blob.flags.c_contiguous
    if not plain or len(blob) < 64 or blob[:4].tobytes() != csr.MAGIC:
        return 0
    return int(blob[6:8].view("<u2")[0])


def _of(blob: np.ndarray) -> Any:
    """The module whose info, validate and unpack are for this blob."""
    kind = _kind(blob)
    return vectors if kind in vectors.NAMES else nm if kind in nm.NAMES else csr


def info(blob: np.ndarray) -> BlobInfo:
    """The header of a blob, checked against the blob's length; FormatError if it is wrong."""
    return _of(blob).info(blob)


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless every offset and column is in bounds; call once before the kernels run."""
    return _of(blob).validate(blob)


def unpack(blob: np.ndarray) -> np.ndarray:
    """Dense float32 [rows, cols] of a blob; FormatError if the blob is corrupt."""
    return _of(blob).unpack(blob)


def entries(blob: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(output, column, value) of every stored value, equal outputs in runs where they can be."""
    if _of(blob) is not csr:
        views = nm.windows(blob) if _of(blob) is nm else vectors.groups(blob)
        rows, columns, values = views.entries()
        order = np.lexsort((columns, rows))
        return rows[order], columns[order], values[order]
    views = csr.sections(blob)
    return (*views.rows_and_columns(), views.values)


def length(head: np.ndarray) -> int:
    """Bytes of the blob that begins with these 64."""
    if _of(head) is not csr:
        return _of(head).length(head.tobytes())
    return csr.blob_bytes(header.read(head)[0])

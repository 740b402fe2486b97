"""All kinds of blobs behind one face: what a module reads of a packed weight."""

from __future__ import annotations

import numpy as np

from prunus.kernels import blob as csr
from prunus.kernels import header, vectors
from prunus.kernels.header import BlobInfo


def _is_vectors(blob: np.ndarray) -> bool:
    """Whether the header says so; anything odd is left to the checks of csr."""
    plain = blob.dtype == np.uint8 and blob.ndim == 1 and blob.flags.c_contiguous
    if not plain or len(blob) < 64 or blob[:4].tobytes() != csr.MAGIC:
        return False
    return int(blob[6:8].view("<u2")[0]) in vectors.NAMES


def info(blob: np.ndarray) -> BlobInfo:
    """The header of a blob, checked against the blob's length; FormatError if it is wrong."""
    return vectors.info(blob) if _is_vectors(blob) else csr.info(blob)


def validate(blob: np.ndarray) -> BlobInfo:
    """FormatError unless every offset and column is in bounds; call once before the kernels run."""
    return vectors.validate(blob) if _is_vectors(blob) else csr.validate(blob)


def unpack(blob: np.ndarray) -> np.ndarray:
    """Dense float32 [rows, cols] of a blob; FormatError if the blob is corrupt."""
    return vectors.unpack(blob) if _is_vectors(blob) else csr.unpack(blob)


def entries(blob: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(output, column, value) of every stored value, equal outputs in runs where they can be."""
    if _is_vectors(blob):
        rows, columns, values = vectors.groups(blob).entries()
        order = np.lexsort((columns, rows))
        return rows[order], columns[order], values[order]
    views = csr.sections(blob)
    return (*views.rows_and_columns(), views.values)


def length(head: np.ndarray) -> int:
    """Bytes of the blob that begins with these 64."""
    if _is_vectors(head):
        return vectors.length(head.tobytes())
    return csr.blob_bytes(header.read(head)[0])

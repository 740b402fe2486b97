"""The weights of a packed file as layers that can be timed without their model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prunus import formats, kernels
from prunus.errors import FormatError
from prunus.runtime.ops import blob_array
from prunus.runtime.weight import aligned


class FileLayer(NamedTuple):
    """One weight of a file: its state-dict name, dense fp32 tensor, kernel blob and non-zeros.

    The blob is of the matrix [weight.shape[0], -1].
    """

    name: str
    weight: Tensor
    blob: Tensor
    nonzeros: int


def layers_from_file(path: str | os.PathLike[str]) -> Iterator[FileLayer]:
    """Yield the sparse 2-d and 4-d floating weights of a packed file, and packed blobs it holds.

    Weights stored dense are left out. Raises FormatError as `prunus.load` does.
    """
    entries, _ = formats.read(path)
    for name, packed in entries.items():
        if packed.format == "dense":
            layer = _from_blob(path, name, packed)
        else:
            layer = _from_weight(name, packed)
        if layer is not None:
            yield layer


def _from_weight(name: str, packed: formats.Packed) -> FileLayer | None:
    """A weight in a sparse format; None for other ranks and dtypes."""
    if len(packed.shape) not in (2, 4) or packed.dtype not in ("float32", "float16", "bfloat16"):
        return None
    blob = torch.from_numpy(kernels.pack(packed))
    weight = torch.from_numpy(kernels.unpack(blob_array(blob))).reshape(packed.shape)
    return FileLayer(name, weight, blob, packed.nonzeros)


def _from_blob(path: str | os.PathLike[str], name: str, packed: formats.Packed) -> FileLayer | None:
    """The packed weight of a compiled model; None for any other tensor."""
    if packed.dtype != "uint8" or not (name == "packed" or name.endswith(".packed")):
        return None
    blob = aligned(torch.from_numpy(formats.unpack(packed)))
    try:
        weight = torch.from_numpy(kernels.unpack(blob_array(blob)))
    except FormatError as error:
        raise FormatError(f"{path}: {name!r} is not a packed weight: {error}") from error
    return FileLayer(name, weight, blob, kernels.info(blob_array(blob)).nnz)

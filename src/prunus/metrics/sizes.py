"""Bytes on disk and bytes of a dense state dict."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from prunus.metrics.counts import unique_tensors


def file_bytes(path: str | os.PathLike[str]) -> int:
    """Size of a file in bytes; of a folder, the sum over the files in it."""
    root = Path(path)
    if root.is_dir():
        return sum(item.stat().st_size for item in root.rglob("*") if item.is_file())
    return root.stat().st_size


def dense_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of `model.state_dict()`, tied ones once, without any file header."""
    return sum(
        tensor.numel() * tensor.element_size() for _, tensor in unique_tensors(model.state_dict())
    )

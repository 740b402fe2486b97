"""Records of a procedure: nested values and tensors in one safetensors file, written atomically."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prunus.errors import FormatError, ValueRangeError

_KEY = "prunus record"
_VERSION = 1


def write_record(path: str | os.PathLike[str], value: Any) -> None:
    """Write dicts, lists, tuples, numbers, texts, None and tensors to a file, whole or not at all.

    Raises ValueRangeError for any other kind of value, with the place where it stands.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"version": _VERSION, "value": _flat(value, "record", tensors)})
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            file.write(save(tensors, {_KEY: text}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_record(path: str | os.PathLike[str]) -> Any:
    """Read what `write_record` wrote. Raises FormatError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if text is None:
            raise FormatError(f"{path} is no record of a prunus procedure")
        record = json.loads(text)
        if record["version"] != _VERSION:
            raise FormatError(f"{path} has version {record['version']!r}, expected {_VERSION}")
        return _nested(record["value"], tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is damaged: {type(error).__name__} {error}") from error


def _flat(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors by names and containers by lists that say what they were."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d} {place}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_flat(key, place, tensors), _flat(item, f"{place}.{key}", tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flat(v, f"{place}[{i}]", tensors) for i, v in enumerate(value)]}
    raise ValueRangeError(
        f"{place} is a {type(value).__name__}, which has no place in a checkpoint: use numbers, "
        f"texts, tensors, and lists and dicts of them (what `train` returns is kept, too)"
    )


def _nested(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {_nested(key, tensors): _nested(item, tensors) for key, item in held}
    items = [_nested(item, tensors) for item in held]
    return items if kind == "list" else tuple(items)


def random_state() -> dict[str, Any]:
    """Return the global random states of torch, NumPy and Python as plain values and tensors."""
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, position, has_gauss, gauss = legacy
    version, words, leftover = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), leftover],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to a state that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((name, words, position, has_gauss, gauss))  # noqa: NPY002
    version, internal, leftover = state["python"]
    random.setstate((version, tuple(internal), leftover))

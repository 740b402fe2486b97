"""Save a model's state dict to a packed file, and load it back."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from prunus import formats
from prunus.drive import attached
from prunus.errors import FormatError, MissingFileError, ShapeError
from prunus.runtime.adopt import adopt
from prunus.runtime.arguments import expect_module, expect_path
from prunus.runtime.weight import PackedWeight
from prunus.sites import unwrap

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

_NUMPY_NAMES = {
    getattr(torch, name): name
    for name in formats.DTYPES
    if name != "bfloat16" and hasattr(torch, name)
}
# Stored as the bits of another dtype, under a note in the meta, as NumPy has no such dtype.
_BITS = {
    getattr(torch, name): carrier
    for name, carrier in (
        ("complex32", torch.float16),
        ("complex64", torch.float32),
        ("complex128", torch.float64),
        ("float8_e4m3fn", torch.uint8),
        ("float8_e5m2", torch.uint8),
        ("float8_e4m3fnuz", torch.uint8),
        ("float8_e5m2fnuz", torch.uint8),
        ("float8_e8m0fnu", torch.uint8),
    )
    if hasattr(torch, name)
}
_ALIASES, _VIEWS = "aliases", "views"


@dataclasses.dataclass(frozen=True)
class Saved:
    """What `save` wrote: sizes in bytes, element counts, and {tensor: format}."""

    path: str
    bytes: int
    dense_bytes: int
    elements: int
    nonzeros: int
    formats: Mapping[str, str]

    def __str__(self) -> str:
        """One line."""
        share = self.bytes / self.dense_bytes if self.dense_bytes else 1.0
        return (
            f"{self.path}: {self.bytes:,} bytes, {share:.1%} of {self.dense_bytes:,} dense; "
            f"{self.nonzeros:,} of {self.elements:,} values are not zero"
        )


def save(model: nn.Module, path: str | os.PathLike[str], *, format: str = "auto") -> Saved:
    """Write model.state_dict() to one packed safetensors file, each tensor as small as it gets.

    `format` forces one format on every tensor of two or more dimensions. Wrappers (DDP,
    torch.compile) are looked through; tied tensors are stored once. -0.0 comes back as +0.0.
    Warns while an attached schedule is unfinished; FormatError for what is not a plain tensor.
    """
    expect_module(model)
    expect_path(path)
    if not Path(path).absolute().parent.is_dir():
        raise MissingFileError(f"{os.fspath(path)}: there is no such folder; create it first")
    model = unwrap(model)
    _warn_if_unfinished(model)
    state = plain_names(model.state_dict())
    entries: dict[str, formats.Packed] = {}
    aliases: dict[str, str] = {}
    views: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        _expect_plain(name, tensor)
        owner = owners.setdefault(_memory(tensor), name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
            continue
        if tensor.dtype in _BITS:
            views[name] = str(tensor.dtype).removeprefix("torch.")
        array, dtype = _to_numpy(name, tensor)
        entries[name] = formats.pack(array, format if array.ndim > 1 else "auto", dtype)
    formats.write(path, entries, {_ALIASES: aliases, _VIEWS: views})
    return _summary(path, model, entries)


@overload
def load(
    path: str | os.PathLike[str], model: None = None, *, mapped: bool = True
) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: M, *, mapped: bool = True) -> M: ...


def load(path: str | os.PathLike[str], model: nn.Module | None = None, *, mapped: bool = True):
    """Read a packed file: its dense state dict, or `model` filled in place and returned.

    Strict: FormatError lists missing and unexpected tensors, ShapeError lists differing shapes; the
    model is unchanged unless everything fits. Packed weights of compiled models are validated.
    mapped: the tensors of a compiled model stay in the file, whose pages processes share; writing
    to them changes this process's copy only. The file may be replaced or removed meanwhile, as
    `save` does, but not be truncated or written to in place: where that may happen, False reads it.
    """
    expect_path(path)
    if model is not None:
        expect_module(model)
    if not Path(path).exists():
        raise MissingFileError(f"{os.fspath(path)}: there is no such file")
    if model is None:
        return _state(path, *formats.read(path), share=False)
    target = unwrap(model)
    share = mapped and any(isinstance(module, PackedWeight) for module in target.modules())
    state = _state(path, *formats.read(path, writable=share), share=share)
    _expect_fit(path, target, state)
    inner = target.state_dict()
    renamed = dict(zip(plain_names(inner), inner, strict=True))
    state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    kept = adopt(target, state) if share else frozenset()
    rest = {name: tensor for name, tensor in state.items() if name not in kept}
    target.load_state_dict(rest, strict=not kept)  # that all is there was checked
    return model


def plain_names(state: Mapping[str, T]) -> dict[str, T]:
    """The same mapping without the name parts that torch.compile puts around submodules."""
    return {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): value
        for name, value in state.items()
    }


def _state(
    path: str | os.PathLike[str],
    entries: Mapping[str, formats.Packed],
    meta: Mapping[str, Any],
    share: bool,
) -> dict[str, Tensor]:
    """{name: dense tensor}; aliases share memory with their owner, and with the file if `share`."""
    aliases, views = meta.get(_ALIASES, {}), meta.get(_VIEWS, {})
    for kind, table in ((_ALIASES, aliases), (_VIEWS, views)):
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise FormatError(f"{path}: {kind} in the meta is not a map of names")
    state = {
        name: _to_torch(path, name, packed, views.get(name), share)
        for name, packed in entries.items()
    }
    for name, owner in aliases.items():
        if name in entries or owner not in entries:
            raise FormatError(f"{path}: {name!r} is stored twice, or aliases the absent {owner!r}")
        state[name] = state[owner]
    return state


def _expect_fit(
    path: str | os.PathLike[str], model: nn.Module, state: Mapping[str, Tensor]
) -> None:
    """Raise unless names, shapes and packed weights fit the model."""
    wanted = plain_names(model.state_dict())
    free, optional = _of_layers(model, "free_sizes"), _of_layers(model, "optional_state")
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("missing in the file", [n for n in wanted if n not in state and n not in optional]),
            ("not in the model", [n for n in state if n not in wanted and n not in optional]),
        )
        if names
    ]
    if problems:
        raise FormatError(
            f"{path} does not fit the model; {'; '.join(problems)}. A file of a dense model fills "
            f"a dense model, a file of a compiled one the same compiled model"
        )
    blobs = _packed_layers(model)
    differing = [
        f"{name} is {list(state[name].shape)} in the file, {list(wanted[name].shape)} in the model"
        for name in wanted
        if name in state and name not in blobs and state[name].shape != wanted[name].shape
        if name not in free
    ]
    if differing:
        raise ShapeError(f"{path} does not fit the model: {'; '.join(differing)}")
    for name, module in blobs.items():
        module.check_packed(state[name], f"{path}: {name}")


def _of_layers(model: nn.Module, attribute: str) -> set[str]:
    """State-dict names that layers list under `attribute`, as packed training layers do."""
    names = {
        f"{path}.{leaf}": None
        for path, module in model.named_modules()
        for leaf in getattr(module, attribute, ())
    }
    return {name.removeprefix(".") for name in plain_names(names)}


def _packed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """{state-dict name of the blob: module} of a compiled model."""
    modules = plain_names({f"{name}.packed": module for name, module in model.named_modules()})
    return {
        name.removeprefix("."): module
        for name, module in modules.items()
        if isinstance(module, PackedWeight)
    }


def _expect_plain(name: str, tensor: object) -> None:
    """FormatError for what no safetensors file holds."""
    if not isinstance(tensor, Tensor):
        raise FormatError(
            f"{name!r} in the state dict is a {type(tensor).__name__}, not a tensor; "
            f"a packed file holds tensors only"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise FormatError(
            f"{name!r} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}; "
            f"a packed file holds plain dense tensors: convert it first"
        )


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """The same for two views exactly when they show the same elements of the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _to_numpy(name: str, tensor: Tensor) -> tuple[np.ndarray, str]:
    """(array, logical dtype) of a tensor, in C order on the CPU."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype in _BITS:
        tensor = tensor.unsqueeze(-1).view(_BITS[tensor.dtype])
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    if tensor.dtype not in _NUMPY_NAMES:
        raise FormatError(f"{name!r} is {tensor.dtype}, which no packed file holds; convert it")
    return tensor.numpy(), _NUMPY_NAMES[tensor.dtype]


def _to_torch(
    path: str | os.PathLike[str],
    name: str,
    packed: formats.Packed,
    view: str | None,
    share: bool,
) -> Tensor:
    """The dense tensor of one entry, in the entry's own memory if `share` and it is dense."""
    whole = packed.parts["values"] if share and packed.format == "dense" else None
    array = formats.unpack(packed) if whole is None or not whole.flags.aligned else whole
    if packed.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    tensor = torch.from_numpy(array)
    if not tensor.numel():
        tensor = tensor.new_zeros(tensor.shape)  # NumPy's strides of an empty array may be zero
    if view is None:
        return tensor
    dtype = next((known for known in _BITS if str(known) == f"torch.{view}"), None)
    if dtype is None or _BITS[dtype] != tensor.dtype or not tensor.dim():
        raise FormatError(f"{path}: {name!r} claims to be {view[:40]!r} stored as {tensor.dtype}")
    if tensor.shape[-1] * tensor.element_size() != dtype.itemsize:
        raise FormatError(f"{path}: the last axis of {name!r} does not hold one {view}")
    return tensor.view(dtype).squeeze(-1)


def _summary(
    path: str | os.PathLike[str], model: nn.Module, entries: Mapping[str, formats.Packed]
) -> Saved:
    """Totals over what is stored, a packed weight counted as the dense fp32 one it stands for."""
    layers, elements, nonzeros, dense_bytes = _packed_layers(model), 0, 0, 0
    for name, packed in entries.items():
        layer = layers.get(name)
        size = math.prod(packed.shape if layer is None else layer.weight_shape)
        elements += size
        nonzeros += packed.nonzeros if layer is None else layer.nonzeros
        dense_bytes += size * (formats.DTYPES[packed.dtype].bits // 8 if layer is None else 4)
    kinds = {name: packed.format for name, packed in entries.items()}
    return Saved(
        os.fspath(path), os.path.getsize(path), dense_bytes, elements, nonzeros, formats=kinds
    )


def _warn_if_unfinished(model: nn.Module) -> None:
    """One warning while an attached sparsifier has not reached its last step."""
    held = attached(model)
    sentence = None if held is None else held.unfinished()
    if sentence:
        warnings.warn(sentence, UserWarning, stacklevel=3)

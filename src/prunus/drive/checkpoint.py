"""A State as plain values and tensors that travel in `optimizer.state_dict()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.core import Site, State
from prunus.errors import AttachError

KEY = "prunus"
VERSION = 1


def to_blob(state: State, method: str = "") -> dict[str, Any]:
    """Turn a state into dicts, numbers and tensors; masks become packed bits (n / 8 bytes).

    method: the name of the sparsifier, which `from_blob` compares.
    """
    return {
        "version": VERSION,
        "method": method,
        "seed": state.seed,
        "step": state.step,
        "round": state.round,
        "masks": {name: _pack(mask) for name, mask in state.masks.items()},
        "trained": {name: _pack(mask) for name, mask in state.trained.items()},
        "sparsity": dict(state.sparsity),
        "statistics": {
            kind: {name: tensor.detach().cpu().clone() for name, tensor in values.items()}
            for kind, values in state.statistics.items()
        },
        "children": [to_blob(child) for child in state.children],
    }


def from_blob(blob: Mapping[str, Any], sites: Sequence[Site], method: str = "") -> State:
    """Rebuild a state; raises AttachError if it is malformed or does not fit sites and method."""
    version = blob.get("version") if isinstance(blob, Mapping) else None
    if version != VERSION:
        raise AttachError(
            f"the checkpoint's sparsity state has version {version!r}; "
            f"this prunus reads version {VERSION}"
        )
    _expect_method(str(blob.get("method", "")), method)
    try:
        return _state(blob, sites)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AttachError(
            f"the checkpoint's sparsity state is damaged: {type(error).__name__} {error}"
        ) from error


def _expect_method(held: str, method: str) -> None:
    """AttachError if a checkpoint was made with another method; its arguments may differ.

    A checkpoint that names none is taken.
    """
    if held and method and _function(held) != _function(method):
        raise AttachError(
            f"the checkpoint was made with another method or combination of methods, {held}, than "
            f"{method}: attach that one, or delete param_groups[0][{KEY!r}] from the optimizer's "
            f"state dict to begin anew from the loaded weights"
        )


def _function(method: str) -> str:
    """The name without its arguments; for a composition these are what it is made of."""
    name = method.partition("(")[0]
    return method if name == "compose" else name


def same_method(state: State, other: State) -> bool:
    """Tell whether two states combine the same number of methods in the same way."""
    return len(state.children) == len(other.children) and all(
        same_method(a, b) for a, b in zip(state.children, other.children, strict=True)
    )


def _state(blob: Mapping[str, Any], sites: Sequence[Site]) -> State:
    shapes = {site.name: site.shape for site in sites}
    return State(
        seed=int(blob["seed"]),
        step=int(blob["step"]),
        round=int(blob["round"]),
        masks=_unpack_all(blob["masks"], shapes),
        sparsity=dict(blob["sparsity"]),
        statistics={kind: dict(values) for kind, values in blob["statistics"].items()},
        children=tuple(from_blob(child, sites) for child in blob["children"]),
        trained=_unpack_all(blob.get("trained", {}), shapes),
    )


def _unpack_all(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    for name in packed:
        if name not in shapes:
            raise AttachError(
                f"the checkpoint holds a mask for {name!r}, which is no site here; attach with "
                f"the same include= and exclude= (sites here: {', '.join(shapes)})"
            )
    return {name: _unpack(name, bits, shapes[name]) for name, bits in packed.items()}


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpack(name: str, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    if bits.numel() != (count + 7) // 8:
        raise AttachError(
            f"the mask of {name!r} in the checkpoint has {bits.numel()} bytes, but shape {shape} "
            f"needs {(count + 7) // 8}: the checkpoint belongs to another model"
        )
    flat = np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)
    return torch.from_numpy(flat).reshape(shape)

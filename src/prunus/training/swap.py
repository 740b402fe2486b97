"""Swap the layers of a model for packed ones and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunus import allocations, encoders, schedules, scores
from prunus import sites as sites_
from prunus.compose import compose
from prunus.core import Allocation, Masks, Signals, Site, Structure
from prunus.drive import attached
from prunus.drive.ends import without_ends
from prunus.errors import AttachError, CompositionError, ShapeError, SiteError, TargetError
from prunus.training.layers import SparseWeight, TrainableConv2d, TrainableLinear, unsupported
from prunus.training.topology import layers_of

M = TypeVar("M", bound=nn.Module)


def sparse_training(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    masks: Masks | None = None,
    allocation: Allocation | None = None,
    structure: Structure | None = None,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
    seed: int = 0,
) -> nn.Module:
    """Swap Linear and Conv2d, in place, for layers that store and compute their non-zeros only.

    Which weights stay: `masks` (site name -> bool, True = kept); or random ones at `sparsity`,
    shared out by `allocation` (default erk), with the draw that rigl and set_ start from; or, with
    neither, the non-zeros of the weights. Kept weights keep their values. Layers that the
    allocation leaves full are packed, too, and compute as dense ones while they are full.
    structure: the units that are drawn (default element; n:m shares uniformly), to be passed to
    `pr.training.dynamic` too, which moves connections. Make the optimizer from
    `model.parameters()` afterwards.
    Depthwise convolutions and other kinds of layers stay dense. Raises SiteError if no layer can be
    swapped or a weight is tied or has hooks, TargetError if there is nothing to leave out,
    ShapeError for masks that do not fit, AttachError if a sparsifier is attached. Biases, hooks
    of modules and what is frozen stay as they are; nothing is swapped where anything is refused.
    """
    if masks is not None and (sparsity, allocation, structure) != (None, None, None):
        raise CompositionError("masks say what stays: leave out sparsity, allocation and structure")
    if attached(model) is not None:
        raise AttachError("a sparsifier is attached to this model: detach it first, pass its masks")
    inner = sites_.unwrap(model)
    found = [s for s in sites_.find(inner, include, exclude) if _swappable(inner, s)]
    if masks is not None:
        found = _chosen(found, masks)
    if not found and isinstance(inner, (nn.Linear, nn.Conv2d)):
        raise SiteError(
            f"the model itself is a {type(inner).__name__} and cannot be swapped in place: use "
            f"Trainable{type(inner).__name__}.from_dense(model, mask), or an nn.Sequential of it"
        )
    if not found:
        raise SiteError("no Linear or plain Conv2d to swap; see the kinds in sparse_training")
    for site in found:
        if site.aliases:
            raise SiteError(f"{site.name!r} is tied to {', '.join(site.aliases)}; exclude it")
    drawn = (sparsity, allocation, structure, seed, include)
    kept = masks if masks is not None else _kept(inner, found, *drawn)
    if not kept:
        raise TargetError("nothing is off: pass sparsity= or masks=, or zero some weights")
    packed = {
        path: _pack(path, inner.get_submodule(path), kept[site.name])
        for site in found
        if site.name in kept
        for path in (site.name.rpartition(".")[0],)
    }
    for path, layer in packed.items():
        put(inner, path, layer)
    for module in inner.modules():
        if isinstance(module, _ENCODERS) and not encoders.dense(module):
            encoders.slow(module)
    return model


def _swappable(model: nn.Module, site: Site) -> bool:
    path, _, leaf = site.name.rpartition(".")
    module = model.get_submodule(path)
    plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and not unsupported(module))
    return plain and leaf == "weight" and bool(path)


def _chosen(found: list[Site], masks: Masks) -> list[Site]:
    names = {site.name for site in found}
    unknown = [name for name in masks if name not in names]
    if unknown:
        raise SiteError(
            f"masks for {', '.join(unknown)}, which cannot be swapped; swappable: "
            f"{', '.join(sorted(names)) or 'nothing'}"
        )
    return [site for site in found if site.name in masks]


def _kept(
    model: nn.Module,
    found: list[Site],
    sparsity: float | None,
    allocation: Allocation | None,
    structure: Structure | None,
    seed: int,
    include: sites_.Patterns,
) -> Mapping[str, Tensor]:
    weights = sites_.weights(sites_.parameters(model, found))
    if sparsity is None:
        kept = {site.name: weights[site.name] != 0 for site in found}
        return {name: mask for name, mask in kept.items() if not bool(mask.all())}
    pinned = structure is not None and structure.pinned is not None
    method = compose(
        scores.random(),
        structure=structure,
        allocation=allocation or (allocations.uniform() if pinned else allocations.erk()),
        schedule=schedules.one_shot(sparsity),
    )
    found = list(without_ends(method, model, tuple(found), include))
    drawn = method.update(method.init(found, weights, seed), found, weights, Signals()).state.masks
    if all(bool(mask.all()) for mask in drawn.values()):
        return {}
    # A layer that the allocation leaves full is packed too: later moves may thin it out.
    return {
        site.name: drawn.get(site.name, torch.ones_like(weights[site.name], dtype=torch.bool))
        for site in found
    }


_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
_HOOK_ENDS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook")
_HOOKS = [n for n in vars(nn.Module()) if n.endswith(_HOOK_ENDS) and "state_dict" not in n]
"""Attributes of a module that hold its forward and backward hooks."""


def _pack(path: str, module: nn.Module, mask: Tensor) -> SparseWeight:
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    weight: Any = module.weight
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        raise SiteError(
            f"'{path}.weight' has hooks on its gradient, which a packed weight of another shape "
            f"cannot keep: remove them, or exclude the layer"
        )
    kind = TrainableLinear if isinstance(module, nn.Linear) else TrainableConv2d
    try:
        layer: SparseWeight = kind.from_dense(module, mask)  # pyright: ignore[reportArgumentType]
    except ShapeError as error:
        raise ShapeError(f"'{path}.weight': {error}") from None
    return _like(module, layer)


def _like(old: nn.Module, new: M) -> M:
    """The new layer with the bias itself and the hooks of the one that it replaces."""
    new.bias = old.bias
    for name in _HOOKS:
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    return new


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def to_dense(model: nn.Module) -> nn.Module:
    """Swap packed layers back, in place, for torch's with exact zeros (then: save, compile).

    A model that is itself one packed layer is left alone: its dense twin is returned.
    """
    inner = sites_.unwrap(model)
    for path, layer in layers_of(inner).items():
        assert isinstance(layer, (TrainableLinear, TrainableConv2d))
        if not path:
            return _like(layer, layer.to_dense())
        put(inner, path, _like(layer, layer.to_dense()))
    for module in inner.modules():
        if isinstance(module, _ENCODERS) and encoders.dense(module):
            encoders.fast(module)
    return model

"""Swap the layers of a model for packed ones and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from prunus import allocations, schedules, scores
from prunus import sites as sites_
from prunus.compose import compose
from prunus.core import Allocation, Masks, Signals, Site, Structure
from prunus.drive import attached
from prunus.errors import AttachError, SiteError, TargetError
from prunus.training.layers import SparseWeight, TrainableConv2d, TrainableLinear, unsupported
from prunus.training.topology import layers_of


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
    neither, the non-zeros of the weights. Kept weights keep their values. structure: the units that
    are drawn (default element; n:m shares uniformly), to be passed to `pr.training.dynamic` too,
    which moves connections. Make the optimizer from `model.parameters()` afterwards.
    Depthwise convolutions and other kinds of layers stay dense. Raises SiteError if no layer can be
    swapped or a weight is tied, TargetError if there is nothing to leave out, AttachError if a
    sparsifier is attached.
    """
    if attached(model) is not None:
        raise AttachError("a sparsifier is attached to this model: detach it first, pass its masks")
    inner = sites_.unwrap(model)
    found = [s for s in sites_.find(inner, include, exclude) if _swappable(inner, s)]
    if masks is not None:
        found = _chosen(found, masks)
    if not found:
        raise SiteError("no Linear or plain Conv2d to swap; see the kinds in sparse_training")
    for site in found:
        if site.aliases:
            raise SiteError(f"{site.name!r} is tied to {', '.join(site.aliases)}; exclude it")
    drawn = (sparsity, allocation, structure, seed)
    kept = masks if masks is not None else _kept(inner, found, *drawn)
    if not kept:
        raise TargetError("nothing is off: pass sparsity= or masks=, or zero some weights")
    for site in found:
        if site.name in kept:
            path = site.name.rpartition(".")[0]
            put(inner, path, _pack(inner.get_submodule(path), kept[site.name]))
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
    return method.update(method.init(found, weights, seed), found, weights, Signals()).state.masks


def _pack(module: nn.Module, mask: Tensor) -> SparseWeight:
    if isinstance(module, nn.Linear):
        return TrainableLinear.from_dense(module, mask).train(module.training)
    assert isinstance(module, nn.Conv2d)
    return TrainableConv2d.from_dense(module, mask).train(module.training)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace a submodule."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def to_dense(model: nn.Module) -> nn.Module:
    """Swap packed layers back, in place, for torch's with exact zeros (then: save, compile)."""
    inner = sites_.unwrap(model)
    for path, layer in layers_of(inner).items():
        assert isinstance(layer, (TrainableLinear, TrainableConv2d))
        if path:
            put(inner, path, layer.to_dense())
    return model

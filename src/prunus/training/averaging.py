"""Moving averages of weights whose places move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunus.arguments import check_share
from prunus.errors import ShapeError
from prunus.sites import unwrap
from prunus.training.layers import SparseWeight


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float = 0.999) -> None:
    """Move a copy of a model towards it: a <- decay a + (1 - decay) w, weight by weight.

    averaged: `copy.deepcopy(model)`, made before; call this after each optimizer step. A packed
    layer takes the model's places: what was dropped is gone, what has grown starts its average at
    the model's value. Buffers are copied. `torch.optim.swa_utils.AveragedModel` averages by index,
    which is right only while no connection moves; packed layers refuse to compute after that.
    Raises ShapeError if the models differ, ValueRangeError for a decay outside of [0, 1].
    """
    check_share(decay=decay)
    averaged, model = unwrap(averaged), unwrap(model)
    theirs, ours = dict(model.named_modules()), dict(averaged.named_modules())
    if theirs.keys() != ours.keys():
        raise ShapeError(f"{type(averaged).__name__} is not a copy of {type(model).__name__}")
    packed = [name for name, layer in theirs.items() if isinstance(layer, SparseWeight)]
    for name in packed:
        _align(ours[name], theirs[name])  # pyright: ignore[reportArgumentType]
    _follow(dict(averaged.named_parameters()), dict(model.named_parameters()), decay)
    _follow(dict(averaged.named_buffers()), dict(model.named_buffers()), 0.0)


def _align(mine: SparseWeight, other: SparseWeight) -> None:
    """Give a packed layer the places of another, and its values where there were none."""
    if not isinstance(mine, SparseWeight) or mine.shape != other.shape:
        raise ShapeError(f"{mine} is not a copy of {other}")
    mine.forward_set = None if other.forward_set is None else other.forward_set.clone()
    if mine.pattern is other.pattern:
        return
    old, new = mine.pattern.places(), other.pattern.places()
    at = torch.searchsorted(old, new).clamp_(max=max(0, len(old) - 1))
    found = old[at] == new if len(old) else torch.zeros(len(new), dtype=torch.bool)
    values = other.values.detach().clone()
    values[found] = mine.values.detach()[at[found]].to(values)
    mine.pattern = other.pattern
    mine.values = nn.Parameter(values, mine.values.requires_grad)


def _follow(mine: dict[str, Tensor], other: dict[str, Tensor], decay: float) -> None:
    for name, held in mine.items():
        if name not in other or other[name].shape != held.shape:
            raise ShapeError(f"{name!r}: the averaged model is not a copy of the model")
        value = other[name].detach().to(held.device)
        if held.is_floating_point() and decay:
            held.lerp_(value.to(held.dtype), 1 - decay)
        else:
            held.copy_(value)

"""Move connections of a packed layer in place: drop, grow, and carry moments by position."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.errors import DisagreementError, ValueRangeError
from prunus.sites import unwrap
from prunus.training.layers import SparseWeight
from prunus.training.pattern import Pattern


@torch.no_grad()
def rewire(layer: SparseWeight, optimizer: Optimizer, drop: Tensor, grow: Tensor) -> None:
    """Drop stored weights and grow others at zero; moments and gradients go with their weights.

    drop: bool [nnz]; grow: flat places (int64) that are not stored now. What is grown starts with
    zero moments, outside of the forward set if there is one. Where the number of weights
    changes, the parameter becomes another object, in the optimizer too: autograd remembers sizes.
    """
    old = layer.values
    drop, grow = drop.cpu(), grow.cpu().sort().values
    places = layer.pattern.places()
    near = torch.searchsorted(places, grow).clamp(max=max(0, len(places) - 1))
    if grow.numel() and len(places) and bool((places[near] == grow).any()):
        raise ValueRangeError("a place to grow is stored already")
    kept = places[~drop]
    new_places = torch.searchsorted(kept, grow) + torch.arange(len(grow))
    there = torch.ones(len(kept) + len(grow), dtype=torch.bool)
    there[new_places] = False
    merged = places.new_empty(len(there))
    merged[there], merged[new_places] = kept, grow
    count, stays, stored = old.shape[0], (~drop).to(old.device), there.to(old.device)

    def carried(held: Tensor) -> Tensor:
        moved = held.new_zeros(len(there))
        moved[stored] = held[stays.to(held.device)]
        return moved

    layer.pattern = Pattern.of(layer.pattern.shape, merged)
    if layer.forward_set is not None:
        layer.forward_set = carried(layer.forward_set)
    state = optimizer.state.get(old, {})
    for name, held in state.items():
        if isinstance(held, Tensor) and held.shape == (count,) and held.dim():
            state[name] = carried(held)
    grad = None if old.grad is None else carried(old.grad)
    old.grad = None
    if len(there) == count:
        old.data = carried(old.data)
        old.grad = grad
        return
    layer.values = new = nn.Parameter(carried(old.data), requires_grad=old.requires_grad)
    new.grad = grad
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def layers_of(model: nn.Module) -> dict[str, SparseWeight]:
    """Return {name: packed layer} of a model, below DDP and torch.compile."""
    inner = unwrap(model)
    return {name: m for name, m in inner.named_modules() if isinstance(m, SparseWeight)}


def check_topology(layers: dict[str, SparseWeight]) -> None:
    """Raise DisagreementError if ranks hold other places; does nothing without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for name, layer in layers.items():
        places = layer.pattern.places()
        mix = torch.stack([places.sum(), (places * (torch.arange(len(places)) % 8191)).sum()])
        low, high = mix.clone(), mix.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise DisagreementError(
                f"ranks hold different topologies of {name!r}: start all from the same weights "
                f"and seed"
            )

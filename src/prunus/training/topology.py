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
from prunus.training.products import NATIVE


@torch.no_grad()
def rewire(layer: SparseWeight, optimizer: Optimizer, drop: Tensor, grow: Tensor) -> None:
    """Drop stored weights and grow others at zero; moments and gradients go with their weights.

    drop: bool [nnz]; grow: flat places (int64) that are not stored now. What is grown starts with
    zero moments, outside of the forward set if there is one. Where the number of weights
    changes, the parameter becomes another object, in the optimizer too: autograd remembers sizes.
    """
    old = layer.values
    pattern, source = _merged(layer.pattern, drop.cpu(), grow.cpu().sort().values)
    count, fresh = old.shape[0], (source < 0).to(old.device)
    source = source.clamp_(min=0).to(old.device)

    def carried(held: Tensor) -> Tensor:
        if not count:
            return held.new_zeros(len(source))
        moved = held[source.to(held.device)]
        return moved.masked_fill_(fresh.to(held.device), 0)

    layer.pattern = pattern
    if layer.forward_set is not None:
        layer.forward_set = carried(layer.forward_set)
    state = optimizer.state.get(old, {})
    for name, held in state.items():
        if isinstance(held, Tensor) and held.shape == (count,) and held.dim():
            state[name] = carried(held)
    grad = None if old.grad is None else carried(old.grad)
    old.grad = None
    if len(source) == count:
        old.data = carried(old.data)
        old.grad = grad
        return
    layer.values = new = nn.Parameter(carried(old.data), requires_grad=old.requires_grad)
    new.grad = grad
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def _merged(pattern: Pattern, drop: Tensor, grow: Tensor) -> tuple[Pattern, Tensor]:
    """The pattern after a move, and where each of its non-zeros was (int32, -1: nowhere)."""
    kept = pattern.nnz - int(drop.count_nonzero())
    if NATIVE is None or not pattern.nnz or not kept + len(grow):
        return _merged_in_torch(pattern, drop, grow)
    total, drop, grow = kept + len(grow), drop.contiguous(), grow.long().contiguous()
    offsets = torch.empty(pattern.shape[0] + 1, dtype=torch.int32)
    columns = torch.empty(total, dtype=torch.int16)
    source = torch.empty(total, dtype=torch.int32)
    made = (offsets.data_ptr(), columns.data_ptr(), source.data_ptr())
    address = pattern.address(torch.empty(0))
    if drop.shape != (pattern.nnz,) or drop.dtype != torch.bool:
        raise ValueRangeError(f"`drop` is not a bool for each of {pattern.nnz} weights")
    if not NATIVE.rewire_ptr(address, drop.data_ptr(), grow.data_ptr(), len(grow), *made):
        raise ValueRangeError("a place to grow is stored already, or outside of the weight")
    return Pattern(pattern.shape, offsets, columns), source


def _merged_in_torch(pattern: Pattern, drop: Tensor, grow: Tensor) -> tuple[Pattern, Tensor]:
    places = pattern.places()
    near = torch.searchsorted(places, grow).clamp(max=max(0, len(places) - 1))
    if grow.numel() and len(places) and bool((places[near] == grow).any()):
        raise ValueRangeError("a place to grow is stored already")
    stays = (~drop).nonzero().flatten()
    kept = places[stays]
    source = torch.full((len(kept) + len(grow),), -1, dtype=torch.int32)
    old = torch.searchsorted(grow, kept) + torch.arange(len(kept))
    source[old] = stays.to(torch.int32)
    merged = places.new_empty(len(source))
    merged[torch.searchsorted(kept, grow) + torch.arange(len(grow))] = grow
    merged[old] = kept
    return Pattern.of(pattern.shape, merged), source


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

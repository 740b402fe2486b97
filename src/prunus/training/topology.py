"""Move connections of a packed layer in place: drop, grow, and carry moments by position."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import rng
from prunus.core import check_sparsity
from prunus.errors import AttachError, DisagreementError, NotFiniteError, ValueRangeError
from prunus.sites import unwrap
from prunus.training.functions import Rows
from prunus.training.layers import SparseWeight, distinct
from prunus.training.pattern import Pattern
from prunus.training.products import blocks


@torch.no_grad()
def rewire(layer: SparseWeight, optimizer: Optimizer, drop: Tensor, grow: Tensor) -> None:
    """Drop stored weights and grow others at zero; moments and gradients go with their weights.

    drop: bool [nnz]; grow: flat places (int64) that are not stored now. What is grown starts with
    zero moments. The parameter stays the same object.
    """
    old = layer.values
    stay = (~drop).nonzero().flatten()
    places = layer.pattern.places()
    if grow.numel() and bool(torch.isin(grow, places).any()):
        raise ValueRangeError("a place to grow is stored already")
    merged, order = torch.cat([places[stay], grow]).sort()
    source = torch.cat([stay, torch.full_like(grow, -1)])[order].to(old.device)
    there = source >= 0
    count = old.shape[0]

    def carried(held: Tensor) -> Tensor:
        moved = held.new_zeros(len(source))
        moved[there] = held[source[there]]
        return moved

    layer.pattern = Pattern.of(layer.pattern.shape, merged)
    state = optimizer.state.get(old, {})
    for name, held in state.items():
        if isinstance(held, Tensor) and held.shape == (count,) and held.dim():
            state[name] = carried(held)
    grad = None if old.grad is None else carried(old.grad)
    old.grad = None
    old.data = carried(old.data)
    old.grad = grad


def free_places(pattern: Pattern, count: int, key: rng.Key) -> Tensor:
    """Draw `count` places that are not stored, uniformly, in memory proportional to the stored."""
    taken = pattern.places()
    size = math.prod(pattern.shape)
    if count > size - len(taken):
        raise ValueRangeError(f"cannot grow {count} weights: {size - len(taken)} places are free")
    rank = distinct(size - len(taken), count, key)
    # The r-th free place lies behind all stored places p_i with p_i - i <= r.
    return rank + torch.searchsorted(taken - torch.arange(len(taken)), rank, right=True)


class LargestGradients:
    """The `count` places outside of a pattern where |dL/dw| is largest, found in a backward pass.

    Rows of the dense gradient are made a block at a time and reduced to the best so far; ties go to
    the lower place. With torch.distributed, blocks are summed over ranks. Of several backward
    passes before a step the last counts.
    """

    def __init__(self, layer: SparseWeight, count: int) -> None:
        """Use as `layer.watch`."""
        self.pattern, self.count = layer.pattern, count
        self.places = torch.empty(0, dtype=torch.int64)

    def __call__(self, rows: Rows) -> None:
        """Look at the gradient of one backward pass."""
        self.places, best, least = torch.empty(0, dtype=torch.int64), torch.empty(0), -1.0
        for begin, end in blocks(self.pattern) if self.count else ():
            dense = rows(begin, end).detach()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(dense)
            size = dense.abs().reshape(-1).cpu()
            if not bool(torch.isfinite(size.sum())) and not bool(torch.isfinite(size).all()):
                raise NotFiniteError(f"the gradient of rows {begin} to {end} is not finite")
            size[self.pattern.row_places(begin, end)] = -1.0
            found = (size > least).nonzero().flatten()
            best = torch.cat([best.to(size), size[found]])
            self.places = torch.cat([self.places, found + begin * self.pattern.shape[1]])
            if len(best) > 2 * self.count:
                best = self._reduce(best)
                least = float(best.min())
        self._reduce(best)

    def _reduce(self, best: Tensor) -> Tensor:
        """Keep the `count` largest, in the order of their places."""
        order = best.sort(descending=True, stable=True).indices[: self.count].sort().values
        self.places = self.places[order]
        return best[order]


def layers_of(model: nn.Module) -> dict[str, SparseWeight]:
    """Return {name: packed layer} of a model, below DDP and torch.compile."""
    inner = unwrap(model)
    return {name: m for name, m in inner.named_modules() if isinstance(m, SparseWeight)}


class Dynamic:
    """Dynamic sparse training of packed layers, driven by the optimizer's own steps.

    At every `every`-th step, before `stop`: each layer drops turnover(step) of its weights, the
    smallest |w|, and grows as many others. step: optimizer steps done.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        grow: Literal["random", "gradient"],
        every: int,
        stop: int,
        turnover: Callable[[int], float],
        seed: int,
    ) -> None:
        """Use `dynamic`."""
        self.layers = layers_of(model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [name for name, layer in self.layers.items() if id(layer.values) not in held]
        if not self.layers or lost:
            raise AttachError(
                f"the optimizer does not train the packed layers {', '.join(lost) or '(none)'}: "
                f"call sparse_training first, then make the optimizer from model.parameters()"
            )
        self.grow, self.every, self.stop, self.turnover = grow, every, stop, turnover
        self.seed, self.step = seed, 0
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Stop; the topology stays as it is."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers.values():
            layer.watch = None

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed run needs beside model and optimizer."""
        return {"step": self.step, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.seed = int(state["step"]), int(state["seed"])
        self._prepare()

    def _due(self) -> bool:
        return 0 < self.step < self.stop and self.step % self.every == 0

    def _count(self, layer: SparseWeight) -> int:
        free = math.prod(layer.shape) - layer.nonzeros
        return min(int(self.turnover(self.step) * layer.nonzeros + 1e-6), free)

    def _prepare(self) -> None:
        """Ask for the gradient outside of the pattern where the coming step needs it."""
        for layer in self.layers.values():
            wanted = self.grow == "gradient" and self._due()
            layer.watch = LargestGradients(layer, self._count(layer)) if wanted else None

    def _before_step(self, optimizer: Optimizer, *rest: Any) -> None:
        if not self._due():
            return
        for name, layer in self.layers.items():
            count = self._count(layer)
            if self.grow == "random":
                grown = free_places(layer.pattern, count, (self.seed, self.step, name, "grow"))
            else:
                assert isinstance(layer.watch, LargestGradients)
                grown = layer.watch.places
            drop = torch.zeros(layer.nonzeros, dtype=torch.bool)
            order = layer.values.detach().abs().cpu().sort(stable=True, descending=True).indices
            drop[order[layer.nonzeros - len(grown) :]] = True
            rewire(layer, optimizer, drop, grown)
        check_topology(self.layers)

    def _after_step(self, optimizer: Optimizer, *rest: Any) -> None:
        self.step += 1
        self._prepare()


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


def dynamic(
    model: nn.Module,
    optimizer: Optimizer,
    steps: int,
    *,
    grow: Literal["random", "gradient"] = "gradient",
    every: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
    seed: int = 0,
) -> Dynamic:
    """Move connections of all packed layers while `optimizer` trains them; the loop stays as it is.

    grow: "gradient" (RigL) or "random" (SET); fraction: of each layer's weights, decayed by a
    cosine to 0 at `stop` of the steps. No dense weight or gradient exists at any time.
    Source: Evci et al. 2020, arXiv 1911.11134; Mocanu et al. 2018, arXiv 1707.04780.
    Raises AttachError if the optimizer does not hold the packed values.
    """
    check_sparsity(fraction, "the fraction dropped")
    end = max(1, int(steps * stop))
    if every < 1 or grow not in ("random", "gradient"):
        raise ValueRangeError(f"every={every} and grow={grow!r}: at least 1; random or gradient")

    def turnover(step: int) -> float:
        return fraction / 2 * (1 + math.cos(math.pi * min(step, end) / end))

    return Dynamic(model, optimizer, grow, every, end, turnover, seed)

"""Drive the topology of packed layers by the optimizer's own steps."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import growth
from prunus.core import Sparsifier, Structure
from prunus.errors import AttachError, CompositionError
from prunus.training.candidates import attached_places, free_places, top
from prunus.training.layers import SparseWeight
from prunus.training.recipes import At, Move, Recipe, Stored, check_moves, exchange
from prunus.training.structured import moved, ranking_of, structures_of
from prunus.training.topology import check_topology, layers_of, rewire
from prunus.training.watches import Watch

_DRIVEN: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Dynamic]] = (
    weakref.WeakKeyDictionary()
)


class Dynamic:
    """Dynamic sparse training of packed layers, driven by the optimizer's own steps.

    step: optimizer steps done; memory: what the recipe remembers; structures: layer -> what moves
    as one, single weights where absent; distributed: whether all ranks move together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        recipe: Recipe,
        seed: int,
        structure: Structure | Mapping[str, Structure] | None = None,
        distributed: bool | None = None,
    ) -> None:
        """Use `dynamic`."""
        self.layers = _moving(model, optimizer)
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.distributed = many if distributed is None else distributed and many
        if recipe.resizes and self.distributed:
            raise AttachError(
                f"{recipe.name} changes how many weights a layer stores, and DDP's buckets have "
                f"fixed sizes: take a recipe that keeps counts (rigl, set_, mest, itop, top_kast), "
                f"or pass distributed=False if this process trains alone"
            )
        self.recipe, self.seed, self.step = recipe, seed, 0
        self.structures = structures_of(self.layers, structure, recipe)
        self.memory: dict[str, float] = dict(recipe.memory)
        self._watches: dict[str, Watch] = {}
        self._passes: dict[str, int] = {}  # most backward passes between two steps
        self._sizes = {name: layer.nonzeros for name, layer in self.layers.items()}
        self._skipped = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _DRIVEN.setdefault(optimizer, weakref.WeakSet()).add(self)
        self._prepare()

    def detach(self) -> None:
        """Stop; the topology stays as it is."""
        for handle in self._handles:
            handle.remove()
        for driven in _DRIVEN.values():
            driven.discard(self)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside model and optimizer."""
        return {"step": self.step, "seed": self.seed, "memory": dict(self.memory)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.seed = int(state["step"]), int(state["seed"])
        self.memory = {**self.recipe.memory, **state.get("memory", {})}
        self._prepare()

    @property
    def _learning(self) -> dict[str, SparseWeight]:
        """Layers that are not frozen."""
        return {n: layer for n, layer in self.layers.items() if layer.values.requires_grad}

    def _forget(self) -> None:
        for watch in self._watches.values():
            watch.remove()
        self._watches.clear()
        for layer in self.layers.values():
            layer.watch = layer.active = None

    def _prepare(self) -> None:
        """Watch gradients or activities outside of the pattern where the coming step needs them.

        At other steps passes are counted only, so that the move knows how many make up a step.
        """
        self._forget()
        grow, due = self.recipe.grow, self.recipe.due(self.step)
        if grow not in ("gradient", "hebbian"):
            return
        for name, layer in self._learning.items():
            grows, unit = due and self._most(layer) > 0, name in self.structures
            passes = self._passes.get(name, 0) if grows else 1
            if unit:  # held, and looked at when it is known what is dropped
                passes = 0 if due else 1
            count = self._most if grows and not unit else _none
            self._watches[name] = watch = Watch(layer, count, passes, self.distributed)
            if grow == "gradient":
                layer.watch = watch
            else:
                layer.active = watch

    def _most(self, layer: SparseWeight) -> int:
        return self.recipe.most(self.step, layer.nonzeros, math.prod(layer.shape))

    def _complete(self) -> bool:
        """Whether the watches saw all passes of this step, and nothing but numbers; else warn."""
        looking = {n: w for n, w in self._watches.items() if w.wanted or n in self.structures}
        for watch in looking.values():
            if watch.wanted:
                watch.find()
        why = ""
        if looking and not any(w.seen for w in looking.values()):
            why, names = "no backward pass came before it", list(looking)
        elif names := [n for n, w in looking.items() if w.bad]:
            why = "a gradient is not finite"
        elif names := [n for n, w in looking.items() if not w.complete]:
            why = "it had more backward passes than any before"
        elif names := [n for n, w in looking.items() if not w.fits]:
            why = "another topology was loaded after its backward pass"
        if why:
            warnings.warn(
                f"step {self.step}: {why} ({', '.join(names)}): connections of all layers stay "
                f"where they are until the next move",
                stacklevel=5,
            )
        return not why

    def _grown(self, name: str, layer: SparseWeight, count: int) -> Tensor:
        key = (self.seed, self.step, name, "grow")
        if self.recipe.grow == "random" or not count:
            return free_places(layer.pattern, count, key)
        if self.recipe.grow == "preferential":
            return attached_places(layer.pattern, count, key, math.prod(layer.shape[2:]))
        return self._watches[name].take(count)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Move now, or behind the first run of a closure, which makes the gradients."""
        # A fused optimizer under a GradScaler skips the step by itself: then nothing happened.
        found = getattr(optimizer, "found_inf", None)
        self._skipped = found is not None and bool(found)
        self._check_sizes(optimizer)
        if self._skipped or not self.recipe.due(self.step):
            return None
        own = args and args[0] is optimizer
        rest = tuple(args[1:]) if own else tuple(args)
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            self._move(optimizer)
            return None
        moved: list[bool] = []

        def wrapped() -> Any:
            loss = closure()
            if not moved:
                moved.append(True)
                self._move(optimizer)
            return loss

        if rest:
            return (*((args[0],) if own else ()), wrapped, *rest[1:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    @torch.no_grad()
    def _move(self, optimizer: Optimizer) -> None:
        if not self._complete():
            return
        learning = self._learning
        single = {n: layer for n, layer in learning.items() if n not in self.structures}
        stored = {name: _stored(layer) for name, layer in single.items()}
        moves, memory = self.recipe.plan(stored, At(self.step, self.seed, self.memory))
        self.memory = {**self.memory, **memory}
        any_moved = False
        for name, move in moves.items():
            layer = self.layers[name]
            any_moved = self._apply(name, layer, optimizer, move) or any_moved
        for name in self.structures.keys() & learning.keys():
            any_moved = self._apply_units(name, optimizer) or any_moved
        if any_moved and self.distributed:
            check_topology(self.layers)
        for layer in self.layers.values():  # a closure may run again
            layer.watch = layer.active = None

    def _check_sizes(self, optimizer: Optimizer) -> None:
        """Raise where a loaded topology has another size than the optimizer's moments."""
        for name, layer in self.layers.items():
            if layer.nonzeros == self._sizes[name]:
                continue
            for key, held in optimizer.state.get(layer.values, {}).items():
                if isinstance(held, Tensor) and held.dim() and held.shape != layer.values.shape:
                    raise AttachError(
                        f"{name!r} was loaded with {layer.nonzeros} weights, but the optimizer's "
                        f"{key} has {held.numel()}: load the optimizer's state too, or make it anew"
                    )
            self._sizes[name] = layer.nonzeros

    def _apply_units(self, name: str, optimizer: Optimizer) -> bool:
        """Exchange units of a layer, with the draws and scores of the masked method."""
        layer, recipe = self.layers[name], self.recipe
        key = (self.seed, self.step, 0, f"{name}.weight" if name else "weight")
        watch = self._watches.get(name)
        ranking = ranking_of(recipe.grow, layer, key, watch.found if watch else None)
        if ranking is None or recipe.score is None or recipe.turnover is None:
            return False
        score, turnover = recipe.score(_stored(layer)), recipe.turnover(self.step)
        drop, grown = moved(layer, self.structures[name], score, ranking, turnover)
        if not len(grown):
            return False
        rewire(layer, optimizer, drop, grown)
        return True

    def _apply(self, name: str, layer: SparseWeight, optimizer: Optimizer, move: Move) -> bool:
        if move.values is not None:
            layer.values.copy_(move.values)
        layer.forward_set = move.forward
        grown, drop = self._grown(name, layer, move.grow), move.drop
        if len(grown) < move.grow:  # no backward pass looked for places: the largest stay
            size = layer.values.abs().cpu().masked_fill(~drop, -1.0)
            drop = drop & ~top(size, move.grow - len(grown))
        if not len(grown) and not bool(drop.any()):
            return False
        rewire(layer, optimizer, drop, grown)
        return True

    def _after_step(self, optimizer: Optimizer, *rest: Any) -> None:
        if not self._skipped:
            for name, watch in self._watches.items():
                self._passes[name] = max(self._passes.get(name, 0), watch.seen)
            self.step += 1
        self._prepare()


def _none(layer: SparseWeight) -> int:
    return 0


def _moving(model: nn.Module, optimizer: Optimizer) -> dict[str, SparseWeight]:
    """The packed layers that are not frozen; AttachError if the optimizer cannot train them."""
    packed = layers_of(model)
    layers = {name: m for name, m in packed.items() if m.values.requires_grad}
    if packed and not layers:
        raise AttachError("all packed layers are frozen (requires_grad=False): nothing moves")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [name for name, layer in layers.items() if id(layer.values) not in held]
    if not layers or lost:
        raise AttachError(
            f"the optimizer does not train the packed layers {', '.join(lost) or '(none)'}: "
            f"call sparse_training first, then make the optimizer from model.parameters()"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise AttachError(
            "LBFGS remembers one vector over all weights, which cannot follow connections that "
            "move: take an optimizer with moments per weight (SGD, Adam and their kin)"
        )
    for other in _DRIVEN.get(optimizer, ()):
        shared = [n for n, m in layers.items() if any(m is o for o in other.layers.values())]
        if shared:
            raise AttachError(
                f"{other.recipe.name} moves {', '.join(shared)} with this optimizer already: "
                f"detach() it first"
            )
    return layers


def _stored(layer: SparseWeight) -> Stored:
    grad = None if layer.values.grad is None else layer.values.grad.detach().cpu()
    places = layer.pattern.places()
    return Stored(layer.values.detach().cpu(), grad, places, math.prod(layer.shape))


def dynamic(
    model: nn.Module,
    optimizer: Optimizer,
    steps: int | Recipe,
    *,
    grow: Literal["random", "gradient", "hebbian", "preferential"] = "gradient",
    every: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
    structure: Structure | Mapping[str, Structure] | None = None,
    seed: int = 0,
    distributed: bool | None = None,
) -> Dynamic:
    """Move connections of all packed layers while `optimizer` trains them; the loop stays as it is.

    steps: of the training, or a recipe of `training.recipes` (then grow to stop are the recipe's).
    grow: "gradient" (RigL), "random" (SET), "hebbian" or "preferential"; fraction: of each layer's
    weights, decayed by a cosine to 0 at `stop` of the steps. structure: what is dropped and grown
    as one, of all packed layers or {layer: structure}; units rank by their summed scores and draw
    as `pr.attach` lets them. No dense weight or gradient exists; of a structure whose units span
    all outputs, one layer's does during a move.
    Source: Evci et al. 2020, arXiv 1911.11134; Mocanu et al. 2018, arXiv 1707.04780.
    distributed: whether gradients are summed over all ranks of torch.distributed, which must all
    train this model (None: if there are several); False: this process trains alone.
    Layers that are frozen now stay, those frozen later while they are. A move whose gradients are
    missing, not finite or incomplete is left out with a warning. `optimizer.step(closure)` moves
    behind the closure's first run.
    Raises AttachError if the optimizer does not hold the packed values, CompositionError for a
    method of `prunus.methods`, for a recipe that would break the structure, for places that are
    not whole units, or that show a structure while none is given (`structures.element()` drops it).
    """
    if isinstance(steps, Recipe):
        return Dynamic(model, optimizer, steps, seed, structure, distributed)
    if isinstance(steps, Sparsifier):
        raise CompositionError(
            f"{steps} works on dense tensors: use a recipe of pr.training.recipes, or pr.attach. "
            f"sparse_momentum has no recipe, because its average gradient is dense by nature"
        )
    check_moves(steps, fraction=fraction, stop=stop)
    end = max(1, int(steps * stop))
    turnover = growth.cosine(fraction, end)
    recipe = exchange(f"dynamic, {grow}", grow, every, end, turnover)
    return Dynamic(model, optimizer, recipe, seed, structure, distributed)

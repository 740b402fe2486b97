"""Drive the topology of packed layers by the optimizer's own steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import growth
from prunus.core import Sparsifier, Structure
from prunus.errors import AttachError, CompositionError, ValueRangeError
from prunus.training.candidates import LargestGradients, attached_places, free_places, top
from prunus.training.functions import Outer
from prunus.training.layers import SparseWeight, TrainableConv2d
from prunus.training.recipes import At, Move, Recipe, Stored, exchange
from prunus.training.structured import moved, ranking_of, structures_of
from prunus.training.topology import check_topology, layers_of, rewire


class Dynamic:
    """Dynamic sparse training of packed layers, driven by the optimizer's own steps.

    step: optimizer steps done; memory: what the recipe remembers; structures: layer -> what moves
    as one, single weights where absent.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        recipe: Recipe,
        seed: int,
        structure: Structure | Mapping[str, Structure] | None = None,
    ) -> None:
        """Use `dynamic`."""
        packed = layers_of(model)
        self.layers = {name: m for name, m in packed.items() if m.values.requires_grad}
        if packed and not self.layers:
            raise AttachError("all packed layers are frozen (requires_grad=False): nothing moves")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        lost = [name for name, layer in self.layers.items() if id(layer.values) not in held]
        if not self.layers or lost:
            raise AttachError(
                f"the optimizer does not train the packed layers {', '.join(lost) or '(none)'}: "
                f"call sparse_training first, then make the optimizer from model.parameters()"
            )
        if recipe.resizes and type(model).__name__ == "DistributedDataParallel":
            raise AttachError(
                f"{recipe.name} changes how many weights a layer stores, and DDP's buckets have "
                f"fixed sizes: take a recipe that keeps counts (rigl, set_, mest, itop, top_kast)"
            )
        self.recipe, self.seed, self.step = recipe, seed, 0
        self.structures = structures_of(self.layers, structure, recipe)
        self.memory: dict[str, float] = dict(recipe.memory)
        self._watches: dict[str, LargestGradients] = {}
        self._passes: dict[str, int] = {}  # most backward passes between two steps
        self._hooks: list[Any] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._prepare()

    def detach(self) -> None:
        """Stop; the topology stays as it is."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside model and optimizer."""
        return {"step": self.step, "seed": self.seed, "memory": dict(self.memory)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.step, self.seed = int(state["step"]), int(state["seed"])
        self.memory = {**self.recipe.memory, **state.get("memory", {})}
        self._prepare()

    def _most(self, layer: SparseWeight) -> int:
        return self.recipe.most(self.step, layer.nonzeros, math.prod(layer.shape))

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watches.clear()
        for layer in self.layers.values():
            layer.watch = None

    def _prepare(self) -> None:
        """Watch gradients or activities outside of the pattern where the coming step needs them.

        At other steps passes are counted only, so that the move knows how many make up a step.
        """
        self._forget()
        grow = self.recipe.grow
        if grow not in ("gradient", "hebbian"):
            return
        due = self.recipe.due(self.step)
        for name, layer in self.layers.items():
            count = self._most(layer) if due else 0
            passes = self._passes.get(name, 0) if count else 1
            if name in self.structures:  # held, and looked at when it is known what is dropped
                count, passes = 0, 0 if due else 1
            self._watches[name] = watch = LargestGradients(layer.pattern, count, passes)
            if grow == "gradient":
                layer.watch = watch
            else:
                self._hooks.append(layer.register_forward_hook(_active(watch)))

    def _complete(self) -> bool:
        """Whether the watches saw all passes of this step; else warn."""
        missed = [n for n, w in self._watches.items() if w.best.count and not w.complete]
        if missed:
            warnings.warn(
                f"step {self.step} had more backward passes than any before: connections of "
                f"{', '.join(missed)} and the other layers stay where they are until the next move",
                stacklevel=4,
            )
        return not missed

    def _grown(self, name: str, layer: SparseWeight, count: int) -> Tensor:
        key = (self.seed, self.step, name, "grow")
        if self.recipe.grow == "random" or not count:
            return free_places(layer.pattern, count, key)
        if self.recipe.grow == "preferential":
            return attached_places(layer.pattern, count, key, math.prod(layer.shape[2:]))
        return self._watches[name].find().take(count)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *rest: Any) -> None:
        if not self.recipe.due(self.step) or not self._complete():
            return
        single = {n: layer for n, layer in self.layers.items() if n not in self.structures}
        stored = {name: _stored(layer) for name, layer in single.items()}
        moves, memory = self.recipe.plan(stored, At(self.step, self.seed, self.memory))
        self.memory = {**self.memory, **memory}
        any_moved = False
        for name, move in moves.items():
            layer = self.layers[name]
            any_moved = self._apply(name, layer, optimizer, move) or any_moved
        for name in self.structures:
            any_moved = self._apply_units(name, optimizer) or any_moved
        if any_moved:
            check_topology(self.layers)

    def _apply_units(self, name: str, optimizer: Optimizer) -> bool:
        """Exchange units of a layer, with the draws and scores of the masked method."""
        layer, recipe = self.layers[name], self.recipe
        key = (self.seed, self.step, 0, f"{name}.weight" if name else "weight")
        ranking = ranking_of(recipe.grow, layer, key, self._watches.get(name))
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
        for name, watch in self._watches.items():
            self._passes[name] = max(self._passes.get(name, 0), watch.seen)
        self.step += 1
        self._prepare()


def _stored(layer: SparseWeight) -> Stored:
    grad = None if layer.values.grad is None else layer.values.grad.detach().cpu()
    places = layer.pattern.places()
    return Stored(layer.values.detach().cpu(), grad, places, math.prod(layer.shape))


def _active(watch: LargestGradients) -> Callable[[nn.Module, Any, Tensor], None]:
    """Look at sum over examples of y_i x_j instead of a gradient."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        window = module.window if isinstance(module, TrainableConv2d) else None
        if torch.is_grad_enabled():
            watch(Outer(args[0].detach(), output.detach(), window, (True, True)))

    return hook


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
) -> Dynamic:
    """Move connections of all packed layers while `optimizer` trains them; the loop stays as it is.

    steps: of the training, or a recipe of `training.recipes` (then grow to stop are the recipe's).
    grow: "gradient" (RigL), "random" (SET), "hebbian" or "preferential"; fraction: of each layer's
    weights, decayed by a cosine to 0 at `stop` of the steps. structure: what is dropped and grown
    as one, of all packed layers or {layer: structure}; units rank by their summed scores and draw
    as `pr.attach` lets them. No dense weight or gradient exists; of a structure whose units span
    all outputs, one layer's does during a move.
    Source: Evci et al. 2020, arXiv 1911.11134; Mocanu et al. 2018, arXiv 1707.04780.
    Raises AttachError if the optimizer does not hold the packed values, CompositionError for a
    method of `prunus.methods`, for a recipe that would break the structure, for places that are
    not whole units, or that show a structure while none is given (`structures.element()` drops it).
    """
    if isinstance(steps, Recipe):
        return Dynamic(model, optimizer, steps, seed, structure)
    if isinstance(steps, Sparsifier):
        raise CompositionError(
            f"{steps} works on dense tensors: use a recipe of pr.training.recipes, or pr.attach. "
            f"sparse_momentum has no recipe, because its average gradient is dense by nature"
        )
    if steps < 1:
        raise ValueRangeError(f"steps is the length of the training, at least 1, got {steps}")
    end = max(1, int(steps * stop))
    turnover = growth.cosine(fraction, end)
    recipe = exchange(f"dynamic, {grow}", grow, every, end, turnover)
    return Dynamic(model, optimizer, recipe, seed, structure)

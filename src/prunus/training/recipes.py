"""How connections of packed layers move: the growth methods that need no dense tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prunus import growth, schedules
from prunus.arguments import check_positive, check_share, check_steps
from prunus.errors import ValueRangeError
from prunus.training.candidates import top
from prunus.training.walks import reparameterize, walk

Rule = Literal["random", "gradient", "hebbian", "preferential"]
RULES = ("random", "gradient", "hebbian", "preferential")


@dataclass(frozen=True)
class Stored:
    """What a recipe sees of a layer: `values` [nnz], their gradient, flat places, dense size."""

    values: Tensor
    grad: Tensor | None
    places: Tensor
    size: int

    @property
    def free(self) -> int:
        """Places that are not stored."""
        return self.size - len(self.values)


@dataclass(frozen=True)
class Move:
    """What becomes of a layer: `drop` bool [nnz], how many others grow.

    values: what is stored from now on, before the move; forward: bool [nnz], what the forward pass
    uses (None: all).
    """

    drop: Tensor
    grow: int = 0
    values: Tensor | None = None
    forward: Tensor | None = None


@dataclass(frozen=True)
class At:
    """When and with which memory a recipe is asked; `seed` and `step` key its draws."""

    step: int
    seed: int
    memory: Mapping[str, float]


Moves = Mapping[str, Move]
Plan = Callable[[Mapping[str, Stored], At], tuple[Moves, Mapping[str, float]]]


@dataclass(frozen=True)
class Recipe:
    """A growth method for packed layers; give it to `dynamic`.

    due(step): whether connections move before that optimizer step; plan: what moves; grow: where
    connections are added; most(step, nnz, size): an upper bound of what a layer grows then;
    resizes: whether layers may end up with another number of weights. turnover, score: of recipes
    that exchange turnover(step) of each layer's lowest score, and so can move whole units.
    """

    name: str
    due: Callable[[int], bool]
    plan: Plan
    grow: Rule = "random"
    most: Callable[[int, int, int], int] = lambda step, nnz, size: size - nnz
    memory: Mapping[str, float] = field(default_factory=dict)
    resizes: bool = False
    turnover: Callable[[int], float] | None = None
    score: Callable[[Stored], Tensor] | None = None


def check_moves(steps: int, /, **shares: float) -> None:
    """ValueRangeError unless `steps` is a length, and the others lie in [0, 1]."""
    check_steps(steps=steps)
    if steps < 1:
        raise ValueRangeError(f"steps is the length of the training, at least 1, got {steps}")
    check_share(**shares)


def _every(every: int, stop: int) -> Callable[[int], bool]:
    check_steps(every=every)
    if every < 1:
        raise ValueRangeError(f"every={every}: steps between moves, at least 1")
    return lambda step: 0 < step < stop and step % every == 0


def lowest(score: Tensor, count: int) -> Tensor:
    """Bool [nnz]: the `count` lowest scores; of equal ones the later go first."""
    return ~top(score, len(score) - count)


def exchange(
    name: str,
    grow: Rule,
    every: int,
    stop: int,
    turnover: Callable[[int], float],
    score: Callable[[Stored], Tensor] = lambda layer: layer.values.abs(),
) -> Recipe:
    """Every so often each layer drops the turnover(step) of lowest score and grows as many."""
    if grow not in RULES:
        raise ValueRangeError(f"grow={grow!r}: one of {', '.join(RULES)}")

    def most(step: int, nnz: int, size: int) -> int:
        return min(int(turnover(step) * nnz + 1e-6), size - nnz)

    def plan(layers: Mapping[str, Stored], at: At) -> tuple[Moves, Mapping[str, float]]:
        counts = {n: most(at.step, len(s.values), s.size) for n, s in layers.items()}
        return {n: Move(lowest(score(s), counts[n]), counts[n]) for n, s in layers.items()}, {}

    due = _every(every, stop)
    return Recipe(name, due, plan, grow, most, turnover=turnover, score=score)


def set_(steps: int, *, every: int = 100, fraction: float = 0.3) -> Recipe:
    """SET: drop the smallest |w|, grow as many at random. See methods.set_.

    Source: Mocanu et al. 2018, arXiv 1707.04780.
    """
    check_moves(steps, fraction=fraction)
    return exchange("set_", "random", every, steps, growth.fixed(fraction))


def rigl(
    steps: int,
    *,
    grow: Rule = "gradient",
    every: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
) -> Recipe:
    """RigL: drop the smallest |w|, grow where |dL/dw| is largest. See methods.rigl.

    grow: "hebbian" adds where |sum of x_j y_i| over the step's batch is largest, "preferential"
    where neurons are well connected; both as in `growth`.
    Source: Evci et al. 2020, arXiv 1911.11134.
    Differs: what a move drops does not return in the same move; in the paper it may.
    """
    check_moves(steps, fraction=fraction, stop=stop)
    end = max(1, int(steps * stop))
    return exchange("rigl", grow, every, end, growth.cosine(fraction, end))


def itop(
    steps: int, *, grow: Rule = "gradient", every: int | None = None, fraction: float = 0.5
) -> Recipe:
    """In-time over-parameterization: long waits, big moves until the end. See methods.itop.

    Source: Liu, Yin, Mocanu, Pechenizkiy 2021, arXiv 2102.02887.
    """
    check_moves(steps, fraction=fraction)
    pause = (
        every if every is not None else max(1, min(1500 if grow == "random" else 4000, steps // 10))
    )
    return exchange("itop", grow, pause, steps, growth.cosine(fraction, steps))


def mest(
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.3,
    gradient: float = 0.01,
    stop: float = 0.75,
) -> Recipe:
    """MEST: drop the smallest |w| + gradient |dL/dw|, grow at random. See methods.mest.

    Source: Yuan et al. 2021, arXiv 2110.14032.
    """
    check_moves(steps, fraction=fraction, stop=stop)
    check_positive(True, gradient=gradient)
    end = max(1, int(steps * stop))

    def score(layer: Stored) -> Tensor:
        size = layer.values.abs()
        return size if layer.grad is None else size + gradient * layer.grad.abs()

    return exchange("mest", "random", every, end, growth.cosine(fraction, end), score)


def granet(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.5,
    initial: float = 0.5,
    stop: float = 0.75,
) -> Recipe:
    """GraNet: prune by |w| over all layers along a cubic ramp, regenerate by gradient.

    initial: the sparsity that `sparse_training` was given. See methods.granet.
    Source: Liu et al. 2021, arXiv 2106.10404.
    """
    check_moves(steps, sparsity=sparsity, fraction=fraction, initial=initial, stop=stop)
    if sparsity < initial:
        raise ValueRangeError(
            f"granet prunes from initial={initial:g} up, not to sparsity={sparsity:g}"
        )
    end = max(1, int(steps * stop))
    ramp, turnover = schedules.cubic(sparsity, 0, end, every, initial), growth.cosine(fraction, end)

    def plan(layers: Mapping[str, Stored], at: At) -> tuple[Moves, Mapping[str, float]]:
        target = ramp.at(at.step)
        total = sum(s.size for s in layers.values())
        keep = total if target is None else round((1 - target) * total)
        sizes = torch.cat([s.values.abs().double() for s in layers.values()])
        gone = lowest(sizes, max(0, len(sizes) - keep))
        moves = {}
        parts = gone.split([len(s.values) for s in layers.values()])
        for (name, layer), part in zip(layers.items(), parts, strict=True):
            count = len(layer.values) - int(part.sum())
            moved = min(int(turnover(at.step) * count + 1e-6), layer.free)
            drop = lowest(layer.values.abs(), len(layer.values) - count + moved)
            moves[name] = Move(drop, moved)
        return moves, {}

    def most(step: int, nnz: int, size: int) -> int:
        return min(int(turnover(step) * nnz + 1e-6), size - nnz)

    def due(step: int) -> bool:
        return step > 0 and ramp.at(step) is not None

    return Recipe("granet", due, plan, "gradient", most, resizes=True)


def nest(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    seed_sparsity: float = 0.95,
    peak_sparsity: float = 0.6,
    grown: float = 0.4,
) -> Recipe:
    """NeST: grow connections from a sparse seed by |dL/dw|, then prune by |w|. See methods.nest.

    seed_sparsity: what `sparse_training` was given (allocation uniform, as the targets here).
    Source: Dai, Yin, Jha 2018, arXiv 1711.02017.
    Differs: connections only; `methods.grow_neurons` widens layers before they are swapped.
    """
    check_moves(
        steps,
        sparsity=sparsity,
        seed_sparsity=seed_sparsity,
        peak_sparsity=peak_sparsity,
        grown=grown,
    )
    if peak_sparsity > min(sparsity, seed_sparsity):
        raise ValueRangeError(
            f"nest grows down to peak_sparsity={peak_sparsity:g}, which must not exceed "
            f"seed_sparsity={seed_sparsity:g} and sparsity={sparsity:g}"
        )
    turn = max(1, int(steps * grown))
    rest = max(1, steps - turn)
    up = schedules.linear(peak_sparsity, 0, turn - 1, every, initial=seed_sparsity)
    begin, end = rest // 10, max(rest // 10, rest * 3 // 4)
    down = schedules.cubic(sparsity, begin, end, max(1, (end - begin) // 100))

    def target(step: int) -> float | None:
        return up.at(step) if step < turn else down.at(step - turn)

    def most(step: int, nnz: int, size: int) -> int:
        goal = target(step) if step < turn else None
        return 0 if goal is None else max(0, round((1 - goal) * size) - nnz)

    def plan(layers: Mapping[str, Stored], at: At) -> tuple[Moves, Mapping[str, float]]:
        moves = {}
        for name, layer in layers.items():
            goal, nnz = target(at.step), len(layer.values)
            keep = nnz if goal is None or at.step < turn else round((1 - goal) * layer.size)
            drop = lowest(layer.values.abs(), max(0, nnz - keep))
            moves[name] = Move(drop, most(at.step, nnz, layer.size))
        return moves, {}

    def due(step: int) -> bool:
        return target(step) is not None

    return Recipe("nest", due, plan, "gradient", most, resizes=True)


def deep_rewiring(
    steps: int, *, lr: float, l1: float = 1e-4, temperature: float | None = None
) -> Recipe:
    """DeepR: a random walk of weights that cannot change their sign. See methods.deep_rewiring.

    lr: the optimizer's. Source: Bellec et al. 2018, arXiv 1711.05136, algorithm 1.
    Differs: the sign of a place is a hash of seed and place, nothing is drawn for dormant places;
    a weight that wakes up gets its first gradient one step later, and is judged with it.
    """
    check_moves(steps)
    check_positive(lr=lr)
    check_positive(True, l1=l1, temperature=0.0 if temperature is None else temperature)
    heat = lr * l1**2 / 18 if temperature is None else temperature
    drift, noise = lr * l1, math.sqrt(2 * lr * heat)

    def plan(layers: Mapping[str, Stored], at: At) -> tuple[Moves, Mapping[str, float]]:
        given = {n: (s.values, s.places, s.free) for n, s in layers.items()}
        grads = {n: s.grad for n, s in layers.items()}
        done = walk(given, grads, lr, drift, noise, at.step, at.seed)
        return {n: Move(drop, grow, values) for n, (values, drop, grow) in done.items()}, {}

    return Recipe("deep_rewiring", lambda t: 0 <= t < steps, plan, resizes=True)


def dynamic_reparameterization(
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.1,
    threshold: float = 1e-3,
    tolerance: float = 0.1,
) -> Recipe:
    """Drop |w| < H everywhere, grow as many at random, by each layer's share of the survivors.

    See methods.dynamic_reparameterization.
    Source: Mostafa & Wang 2019, arXiv 1902.05967, algorithm 1.
    """
    check_moves(steps, fraction=fraction)
    check_positive(threshold=threshold)
    check_positive(True, tolerance=tolerance)

    def plan(layers: Mapping[str, Stored], at: At) -> tuple[Moves, Mapping[str, float]]:
        limit = at.memory["threshold"]
        stay = {n: s.values.abs() >= limit for n, s in layers.items()}
        free = {n: s.free for n, s in layers.items()}
        stay, grown, limit = reparameterize(stay, free, limit, fraction, tolerance)
        return {n: Move(~stay[n], grown[n]) for n in layers}, {"threshold": limit}

    memory = {"threshold": float(threshold)}
    due = _every(every, steps)
    return Recipe("dynamic_reparameterization", due, plan, memory=memory, resizes=True)


def top_kast(
    sparsity: float,
    steps: int,
    *,
    every: int = 1,
    decay: float = 1e-4,
    explore: float = 0.3,
    pause: int = 100,
) -> Recipe:
    """Top-KAST on stored weights: all of them learn (set B), the forward pass uses the largest (A).

    Give `sparse_training` the sparsity of B (the paper: twice as many weights as A). A is the
    1 - sparsity of each layer with the largest |w|, chosen anew `every` steps; w shrinks by
    decay w in A and by decay w / (1 - sparsity) in the rest of B at each choice.
    Source: Jayakumar, Pascanu, Rae, Osindero, Elsen 2020, arXiv 2106.03517.
    Differs: nothing outside of B is stored, so B moves by exchanging its smallest `explore` for
    random places every `pause` steps, in the first three quarters.
    """
    check_moves(steps, sparsity=sparsity, explore=explore)
    check_positive(True, decay=decay)
    anew = _every(every, steps)
    swap = _every(pause, steps * 3 // 4)

    def moved(step: int, nnz: int, size: int) -> int:
        spare = max(0, nnz - round((1 - sparsity) * size))
        return min(int(explore * nnz), spare, size - nnz) if swap(step) else 0

    def plan(layers: Mapping[str, Stored], at: At) -> tuple[Moves, Mapping[str, float]]:
        moves = {}
        for name, layer in layers.items():
            nnz, keep = len(layer.values), round((1 - sparsity) * layer.size)
            if keep > nnz:
                raise ValueRangeError(
                    f"{name}: the backward set holds the forward set, but {nnz} weights are "
                    f"stored and {keep} asked for; pass sparse_training a lower sparsity"
                )
            forward = ~lowest(layer.values.abs(), nnz - keep)
            shrink = torch.where(forward, decay, decay / max(1e-9, 1 - sparsity))
            values = layer.values * (1 - shrink).to(layer.values)
            count = moved(at.step, nnz, layer.size)
            moves[name] = Move(lowest(values.abs(), count), count, values, forward)
        return moves, {}

    return Recipe("top_kast", lambda t: t == 0 or anew(t), plan, most=moved)

"""A genetic search for the sparsity of each site."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from prunus.drive.data import batches_of
from prunus.drive.progress import Progress, shown
from prunus.drive.signals import Loss
from prunus.errors import ValueRangeError
from prunus.search.space import Found, Method, Objective, Space, kept, resumed, settings
from prunus.sites import Patterns


def evolve(
    model: nn.Module,
    method: Method,
    objective: Objective,
    *,
    sparsity: float,
    population: int = 16,
    generations: int = 20,
    spread: float = 0.2,
    least: float = 0.0,
    most: float = 1.0,
    maximize: bool = False,
    seed: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
    inputs: Any = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Found:
    """Search the sparsity of each site by mutation, crossover and selection, at a fixed total.

    method(allocation) -> a method that reaches `sparsity` in all, e.g. lambda a:
    methods.one_shot_magnitude(0.9, allocation=a). objective(model, {site: sparsity}) -> what to
    minimise (maximize: the reverse), of the model pruned so: a loss, an accuracy, FLOPs, bytes, a
    latency; the weights are given back after each. least, most: of any site. A child takes the
    share of each site from one of two parents, then some shares move by N(0, spread^2), or two
    sites exchange weights; what the total misses is added to all alike, within the bounds. The best
    `population` of parents and children go on. Starts from shares alike, erk, and random ones.
    inputs, batches, loss: as for `prune`. folder: a checkpoint after every generation, from which
    the same call goes on; progress: (generations done, generations, text). The same seed finds the
    same. Raises TargetError if the bounds do not allow the total, NotFiniteError for a NaN.
    Source: Whitley & Bogart 1990, IJCNN (genetic algorithms that prune networks). Differs: genes
    are shares of sites, where the paper's are single connections.
    """
    if population < 2 or generations < 0 or spread <= 0:
        raise ValueRangeError(
            f"population >= 2, generations >= 0, spread > 0, got {population}, {generations}, "
            f"{spread}"
        )
    data = (inputs, batches_of(batches), loss)
    space = Space(
        model, method, objective, sparsity, least, most, maximize, include, exclude, *data
    )
    return _evolved(space, population, generations, spread, seed, folder, progress)


def _evolved(
    space: Space,
    population: int,
    generations: int,
    spread: float,
    seed: int,
    folder: str | os.PathLike[str] | None,
    progress: Progress | bool | None,
) -> Found:
    """Run the generations that no record holds yet."""
    given = settings(space, "evolve", population=population, spread=spread, seed=seed)
    path, record = resumed(folder, given)
    show = shown(progress, "evolve")
    alive: list[tuple[float, list[float]]] = []
    history: list[float] = []
    if record is not None:
        alive = [(value, shares) for value, shares in record["alive"]]
        history = record["history"]
        space.known.update({tuple(key): value for key, value in record["known"]})
    for generation in range(len(history), generations + 1):
        rng = np.random.default_rng([seed, generation])
        for shares in _born(space, alive, population, generation, generations, spread, rng):
            alive.append((space.value(shares), shares.tolist()))
        unique = {tuple(shares): (value, shares) for value, shares in alive}
        alive = sorted(unique.values(), key=lambda one: one[0])[:population]
        history.append(alive[0][0])
        known = [[list(key), value] for key, value in space.known.items()]
        held = {"alive": [list(one) for one in alive], "history": history, "known": known}
        kept(path, given, held)
        show(generation, generations, f"best {space.outward(history[-1]):.6g}")
    value, shares = alive[0]
    return Found(
        space.named(shares),
        space.outward(value),
        tuple(space.outward(best) for best in history),
        len(space.known),
    )


def _born(
    space: Space,
    alive: list[tuple[float, list[float]]],
    population: int,
    generation: int,
    generations: int,
    spread: float,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Return the shares of a generation's newcomers."""
    count = len(space.sites)
    if not alive:
        drawn = [space.feasible(rng.random(count)) for _ in range(population)]
        return (space.starts() + drawn)[:population]
    width = spread * (1.0 - 0.9 * generation / max(1, generations))
    return [_child(space, alive, width, rng) for _ in range(population)]


def _child(
    space: Space,
    alive: list[tuple[float, list[float]]],
    width: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Cross two parents, each the better of two drawn ones, and mutate the child."""
    # `alive` is sorted: of two drawn places the lower is the better one.
    places = rng.integers(len(alive), size=(2, 2)).min(axis=1)
    mother, father = (np.array(alive[place][1]) for place in places)
    count = len(mother)
    child = np.where(rng.random(count) < 0.5, mother, father)
    if count > 1 and rng.random() < 0.5:
        giver, taker = rng.choice(count, size=2, replace=False)
        sizes = [site.size for site in space.sites]
        room = min(sizes[giver], sizes[taker])
        amount = np.exp(rng.random() * np.log(max(2.0, width * room)))  # weights, small ones often
        child[giver] += amount / max(1, sizes[giver])
        child[taker] -= amount / max(1, sizes[taker])
    else:
        moved = rng.random(count) < max(0.3, 1.0 / count)
        child = child + moved * rng.normal(size=count) * width
    return space.feasible(np.clip(child, space.least, space.most))

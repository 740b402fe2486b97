"""What both searches share: shares that keep the total, and what they are worth."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus import allocations
from prunus import sites as sites_
from prunus.arguments import check_sparsity
from prunus.core import Allocation, Sparsifier
from prunus.drive import prune
from prunus.drive.ends import without_ends
from prunus.drive.records import read_record, write_record
from prunus.drive.rewrite import same_state
from prunus.drive.signals import Loss
from prunus.errors import NotFiniteError, TargetError, ValueRangeError

Method = Callable[[Allocation], Sparsifier]
"""allocation -> method at the sparsity that is searched for."""

Objective = Callable[[nn.Module, Mapping[str, float]], float]
"""(pruned model, sparsity of each site) -> number."""


@dataclass(frozen=True)
class Found:
    """The best shares: site -> sparsity, their objective, and how the search went.

    history: the best value after each generation or trial; evaluations: models that were judged.
    """

    sparsities: Mapping[str, float]
    value: float
    history: tuple[float, ...]
    evaluations: int

    @property
    def allocation(self) -> Allocation:
        """Return the shares as an allocation, for any method at the same total sparsity."""
        return allocations.overrides(allocations.uniform(), self.sparsities)


@dataclass(frozen=True)
class Space:
    """The model, what is searched and what counts; see `evolve` for the arguments."""

    model: nn.Module
    method: Method
    objective: Objective
    sparsity: float
    least: float = 0.0
    most: float = 1.0
    maximize: bool = False
    include: sites_.Patterns = None
    exclude: sites_.Patterns = None
    inputs: Any = None
    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse bounds that leave no room for the target."""
        for name in ("sparsity", "least", "most"):
            check_sparsity(getattr(self, name), name)
        if not self.least <= self.sparsity <= self.most:
            names = ", ".join(site.name for site in self.sites)
            raise TargetError(
                f"a sparsity of {self.sparsity:g} cannot be met with every site between "
                f"{self.least:g} and {self.most:g}: all would stand at the bound ({names})"
            )

    @cached_property
    def sites(self) -> tuple[sites_.Site, ...]:
        """The sites that shares are searched for, without the ends that `prune` leaves out."""
        found = sites_.find(self.model, self.include, self.exclude)
        method = self.method(allocations.uniform())
        return without_ends(method, self.model, found, self.include, self.inputs)

    def starts(self) -> list[np.ndarray]:
        """Return shares to begin with: all alike, and Erdos-Renyi-Kernel."""
        found = self.sites
        erk = allocations.erk().share(found, {}, self.sparsity)
        alike = np.full(len(found), self.sparsity)
        return [alike, self.feasible(np.array([erk[site.name] for site in found]))]

    def feasible(self, shares: np.ndarray) -> np.ndarray:
        """Return the nearest shares within the bounds that remove the target: clip(x + shift)."""
        sizes = np.array([site.size for site in self.sites], dtype=np.float64)
        target = self.sparsity * sizes.sum()
        low, high = self.least - shares.max() - 1.0, self.most - shares.min() + 1.0
        for _ in range(200):
            middle = (low + high) / 2
            removed = float(sizes @ np.clip(shares + middle, self.least, self.most))
            low, high = (low, middle) if removed >= target else (middle, high)
        return np.clip(shares + high, self.least, self.most)

    def value(self, shares: np.ndarray) -> float:
        """Return what to minimise: the objective of the model pruned so, then restored."""
        found = self.sites
        key = tuple(round(float(x) * site.size) for x, site in zip(shares, found, strict=True))
        if key not in self.known:
            value = self._judged(found, self.named(shares))
            self.known[key] = -value if self.maximize else value
        return self.known[key]

    def named(self, shares: Sequence[float] | np.ndarray) -> dict[str, float]:
        """Return {site: share}."""
        return {site.name: float(x) for site, x in zip(self.sites, shares, strict=True)}

    def outward(self, value: float) -> float:
        """Return a value as the objective gave it."""
        return -value if self.maximize else value

    def _judged(self, found: Sequence[sites_.Site], sparsities: Mapping[str, float]) -> float:
        # all parameters: a solver may shift biases, too
        parameters = dict(sites_.unwrap(self.model).named_parameters())
        backup = {name: p.detach().clone() for name, p in parameters.items()}
        allocation = allocations.overrides(allocations.uniform(), sparsities)
        with same_state(self.model), _given_back(parameters, backup):
            masks = prune(
                self.model,
                self.method(allocation),
                inputs=self.inputs,
                batches=self.batches,
                loss=self.loss,
                include=[site.name for site in found],
            )
            reached = {
                s.name: 1.0 - int(masks[s.name].count_nonzero()) / s.size
                if s.name in masks
                else 0.0
                for s in found
            }
            with torch.no_grad():
                value = float(self.objective(self.model, reached))
        if math.isnan(value):
            raise NotFiniteError(f"the objective is not a number at {dict(sparsities)}")
        return value


@contextmanager
def _given_back(
    parameters: Mapping[str, nn.Parameter], backup: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in backup.items():
                parameters[name].copy_(weight)


def settings(space: Space, kind: str, **more: Any) -> dict[str, Any]:
    """Return what has to be the same for a search to go on."""
    shapes = [[site.name, *site.shape] for site in space.sites]
    bounds = [space.sparsity, space.least, space.most, space.maximize]
    return {"search": kind, "sites": shapes, "bounds": bounds, **more}


def resumed(
    folder: str | os.PathLike[str] | None, given: Mapping[str, Any]
) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the file of a search and what it holds. Raises ValueRangeError for another search."""
    if folder is None:
        return None, None
    path = Path(folder) / f"{given['search']}.safetensors"
    record = read_record(path) if path.exists() else None
    if record is not None and record["settings"] != dict(given):
        raise ValueRangeError(
            f"{path} is of another search, with {record['settings']}: name another folder, or go "
            f"on with the same arguments"
        )
    return path, record


def kept(path: Path | None, given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Keep a search so far."""
    if path is not None:
        write_record(path, {"settings": dict(given), **values})

"""Inputs of the checks and the tools that watch what a part does with them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus import rng
from prunus.checks.rules import Judge
from prunus.core import Site
from prunus.kinds import (
    BIAS,
    GRADIENTS,
    GRAM,
    HESSIAN,
    INPUT_MEAN,
    INPUT_ROWS,
    INPUT_SQUARE,
    OUTPUT_GRAM,
)

SHAPES: tuple[tuple[int, ...], ...] = (
    (8, 12),
    (16, 8),
    (3, 5),
    (1, 1),
    (7, 1),
    (0, 4),
    (4, 8, 3, 3),
    (5, 3, 2, 3),
    (2, 4, 5),
    (1, 5000),
)
"""Even, odd, single, empty, convolutional and long shapes."""

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16)

SITES: tuple[Site, ...] = (
    Site("a.weight", (8, 12)),
    Site("b.weight", (16, 8)),
    Site("c.weight", (4, 8, 3, 3)),
)
"""Sites of a small network; their shapes divide by 2, 4 and 2:4."""

MakeSignal = Callable[[str, Tensor], Tensor]
"""(kind, weight) -> the signal of that kind that belongs to the weight."""


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, key: str = "w") -> Tensor:
    """Return reproducible values from (-1, 1) of mixed sign."""
    return (rng.uniform(("check", key, *shape), shape) * 2 - 1).to(dtype)


def default_signal(kind: str, w: Tensor) -> Tensor:
    """Return a reproducible positive tensor of the shape that the kind has for a site w."""
    columns = math.prod(w.shape[1:])
    outputs = w.shape[0]
    size = {GRAM: columns, HESSIAN: w.numel(), OUTPUT_GRAM: outputs}.get(kind)
    if size is not None:  # a positive definite matrix
        x = rng.uniform(("check signal", kind, *w.shape), (2 * size + 1, size)).double()
        matrix = x.T @ x / (2 * size + 1)
        return matrix if kind == HESSIAN else matrix[None]
    if kind == INPUT_MEAN and columns <= 256:  # of the very inputs of the Gram matrix
        key = ("check signal", GRAM, *w.shape)
        return rng.uniform(key, (2 * columns + 1, columns)).double().mean(0)[None]
    if kind == INPUT_ROWS:
        return rng.uniform(("check signal", kind, *w.shape), (1, 16, columns)) - 0.3
    if kind == BIAS:
        return rng.uniform(("check signal", kind, outputs), (outputs,)).double() - 0.5
    if kind in (INPUT_SQUARE, INPUT_MEAN):
        return rng.uniform(("check signal", kind, *w.shape), (1, columns)).double() + 0.1
    shape = (5, *w.shape) if kind == GRADIENTS else tuple(w.shape)
    return rng.uniform(("check signal", kind, *w.shape), shape).to(w.dtype) + 0.1


def same(left: Any, right: Any) -> bool:
    """Tell whether two results are equal: tensors bit for bit (NaN equals NaN), containers deep."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        return bool(((left == right) | (left.isnan() & right.isnan())).all())
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and bool(left == right)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_copy(item) for item in value]
    return value


def _random_state() -> list[Any]:
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - the global state is what is watched
    return [torch.get_rng_state(), random.getstate(), repr(numpy)]


@contextmanager
def watched(judge: Judge, where: str, **given: Any) -> Iterator[None]:
    """Break the rule 'pure' if one of `given` or the global random state changes inside."""
    before = {name: _copy(value) for name, value in given.items()}
    state = _random_state()
    yield
    for name, value in given.items():
        judge("pure", same(before[name], _copy(value)), f"{where} changed {name} that was given")
    judge("pure", same(state, _random_state()), f"{where} moved the global random state")


def twice(judge: Judge, where: str, call: Callable[[], Any], **given: Any) -> Any:
    """Call twice, with other global seeds, and hold both results to 'pure' and 'same'."""
    with watched(judge, where, **given):
        first = call()
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() % 2**31 + 1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        second = call()
    random.setstate(kept[0])
    np.random.set_state(kept[1])  # noqa: NPY002
    judge("same", same(first, second), f"{where} gave two results for the same inputs")
    return first


def is_names(value: Any) -> bool:
    """Tell whether a value is a frozenset of strings."""
    return isinstance(value, frozenset) and all(isinstance(item, str) for item in value)


def off_by(kept: int, total: int, sparsity: float) -> float:
    """Return by how many elements a mask misses a sparsity."""
    return abs(kept - (1.0 - sparsity) * total)


def default_sites(sites: Sequence[Site] | None) -> tuple[Site, ...]:
    """Return the sites to check on."""
    return SITES if sites is None else tuple(sites)

"""`prunus demo`: the whole chain on the digit images of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from prunus.allocations import erk, floor, global_
from prunus.bench import MLP, digits, digits_cnn, mlp
from prunus.cli.experiment import Experiment, Training
from prunus.core import Allocation, Sparsifier
from prunus.methods import gradual_magnitude

SPARSITY = 0.95
WIDTHS = (2, 4, 8, 16, 32, 64)


def _gradual(allocation: Allocation) -> Callable[[float | None, int], Sparsifier]:
    """Gradual magnitude pruning; few updates, since one costs about as much as a training step."""
    return lambda sparsity, steps: gradual_magnitude(
        SPARSITY if sparsity is None else sparsity,
        steps,
        every=max(1, steps // 24),
        allocation=allocation,
    )


def experiments(seeds: int, folder: Path) -> list[Experiment]:
    """Return a wide MLP of 2.5 million parameters, and a small CNN beside it."""
    return [
        Experiment(
            name="mlp",
            model=lambda seed: mlp(seed=seed),
            data=digits,
            method=_gradual(floor(global_())),
            training=Training(10, 64, "sgd", lr=0.1, weight_decay=5e-4),
            folder=folder,
            seeds=range(seeds),
            threads=1,  # layers of this size gain little from two, and lose much on busy cores
            sweep=(0.5, 0.8, 0.9, 0.98, 0.99),
            frontier=[partial(_narrow, width) for width in WIDTHS],
        ),
        Experiment(
            name="cnn",
            model=lambda seed: digits_cnn(seed=seed),
            data=digits,
            method=_gradual(erk()),
            training=Training(12, 128, "adamw", lr=2e-3, weight_decay=0.01),
            folder=folder,
            seeds=range(seeds),
            threads=1,  # layers of this size gain little from two, and lose much on busy cores
        ),
    ]


def _narrow(width: int, seed: int) -> MLP:
    return mlp(hidden=(width, width), seed=seed)

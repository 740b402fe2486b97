"""A plain training loop that knows nothing of sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from prunus.bench.data import Dataset, batches, generator
from prunus.errors import ValueRangeError

Schedule = Literal["cosine", "linear", "constant"]
Augment = Callable[[Tensor, torch.Generator], Tensor]

_FACTORS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Optimizer steps of one pass over the training data; the last batch may be smaller."""
    if batch_size < 1:
        raise ValueRangeError(f"batch_size is {batch_size}; it must be at least 1")
    return math.ceil(len(dataset.train_inputs) / batch_size)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    schedule: Schedule = "cosine",
    label_smoothing: float = 0.0,
    augment: Augment | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train with cross-entropy and return the loss of every step.

    Each group's learning rate follows `schedule` from its present value and gets it back at the
    end. Order, augmentation and dropout depend on `seed` alone. `on_step(step, total)` is called
    after each step, step counting from 1. Raises ValueRangeError.
    """
    if schedule not in _FACTORS:
        raise ValueRangeError(f"schedule is {schedule!r}; allowed: {', '.join(_FACTORS)}")
    if epochs < 0 or not 0.0 <= label_smoothing < 1.0:
        raise ValueRangeError(
            f"epochs={epochs}, label_smoothing={label_smoothing}; "
            "allowed: epochs >= 0, 0 <= label_smoothing < 1"
        )
    total = epochs * steps_per_epoch(dataset, batch_size)
    rates = [group["lr"] for group in optimizer.param_groups]
    criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inputs, targets in _stream(dataset, batch_size, seed, epochs, augment):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _FACTORS[schedule](len(losses) / total)
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if on_step is not None:
                on_step(len(losses), total)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return losses


def _stream(dataset: Dataset, batch_size: int, seed: int, epochs: int, augment: Augment | None):
    """All batches of all epochs, augmented."""
    for epoch in range(epochs):
        stream = generator(seed, epoch, 1)
        for inputs, targets in batches(
            dataset.train_inputs, dataset.train_targets, batch_size, seed, epoch
        ):
            yield (inputs if augment is None else augment(inputs, stream)), targets

"""Sparse from the first step at 95%: SynFlow, SET and RigL against a static random mask."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch

from prunus import allocations, attach, methods, metrics
from prunus.bench import Dataset, digits, fit, lenet_300_100, steps_per_epoch
from prunus.core import Sparsifier

SPARSITY = 0.95
SEEDS = (0, 1, 2)
EPOCHS, BATCH, EVERY = 15, 64, 46  # the mask moves every second epoch

METHODS: dict[str, Callable[[int], Sparsifier]] = {
    "static random": lambda steps: methods.random_pruning(SPARSITY, allocation=allocations.erk()),
    "SynFlow": lambda steps: methods.synflow(SPARSITY),
    "SET": lambda steps: methods.set_(SPARSITY, steps, every=EVERY, allocation=allocations.erk()),
    "RigL": lambda steps: methods.rigl(SPARSITY, steps, every=EVERY),
}


def train(method: Sparsifier | None, data: Dataset, seed: int) -> tuple[float, int, float]:
    """Return accuracy, non-zeros, and the fraction of the first mask that was exchanged."""
    model = lenet_300_100(inputs=64, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attached, start = None, {}
    if method is not None:
        attached = attach(method, model, optimizer, inputs=data.train_inputs[:1], seed=seed)
        start = dict(attached.masks)
    fit(model, optimizer, data, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    moved = kept = 0
    if attached is not None:
        moved = sum(int((start[name] & ~mask).sum()) for name, mask in attached.masks.items())
        kept = sum(int(mask.sum()) for mask in attached.masks.values())
    right = metrics.accuracy(model, (data.test_inputs, data.test_targets)).value
    return right, metrics.counts(model).nonzeros, moved / max(1, kept)


def main() -> None:
    torch.set_num_threads(1)
    data = {seed: digits(seed) for seed in SEEDS}
    print(f"{'method':16}{'accuracy':>9}{'lowest':>9}{'highest':>9}{'non-zeros':>11}{'moved':>7}")
    for name, build in {"dense": None, **METHODS}.items():
        steps = EPOCHS * steps_per_epoch(data[0], BATCH)
        runs = [train(build and build(steps), data[seed], seed) for seed in SEEDS]
        found, counts, moved = zip(*runs, strict=True)
        row = f"{name:16}{mean(found):>9.1%}{min(found):>9.1%}{max(found):>9.1%}"
        print(f"{row}{max(counts):>11,}{mean(moved):>7.0%}")


if __name__ == "__main__":
    main()

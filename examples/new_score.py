"""A new score in ten lines, checked, and compared fairly with magnitude and random pruning."""

from __future__ import annotations

import copy
from statistics import mean

import torch
from torch import Tensor, nn

from prunus import allocations, attach, compose, metrics, schedules, scores
from prunus.bench import Dataset, digits, fit, lenet_300_100
from prunus.checks import check_score
from prunus.core import Context, Score

SEEDS = (0, 1, 2)
SPARSITIES = (0.9, 0.95, 0.98)


def relative_magnitude() -> Score:
    """Keep what is large for its row and column: |w| / sum of its row + |w| / sum of its column."""

    def value(w: Tensor, at: Context) -> Tensor:
        size = w.abs()
        columns = size.sum(0, keepdim=True).clamp_min(1e-12)
        rows = size.flatten(1).sum(1).reshape(-1, *[1] * (w.ndim - 1)).clamp_min(1e-12)
        return size / rows + size / columns

    return Score("relative_magnitude", value)


def train(
    model: nn.Module, data: Dataset, seed: int, score: Score | None, sparsity: float
) -> float:
    """Train, pruned at the first step by `score` if there is one; return the test accuracy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    if score is not None:
        method = compose(score, allocation=allocations.erk(), schedule=schedules.one_shot(sparsity))
        attached = attach(method, model, optimizer, seed=seed)
        assert abs(attached.sparsity - sparsity) < 1e-4, "all scores keep the same number"
    fit(model, optimizer, data, epochs=8, batch_size=64, seed=seed)
    return metrics.accuracy(model, (data.test_inputs, data.test_targets)).value


def main() -> None:
    torch.set_num_threads(1)
    check_score(relative_magnitude())
    data = {seed: digits(seed) for seed in SEEDS}
    trained = {seed: lenet_300_100(inputs=64, seed=seed) for seed in SEEDS}
    dense = [train(trained[seed], data[seed], seed, None, 0.0) for seed in SEEDS]
    print(f"{'score':20}{'sparsity':>9}{'accuracy':>10}{'lowest':>9}{'highest':>9}")
    print(f"{'dense':20}{0:>9.0%}{mean(dense):>10.1%}{min(dense):>9.1%}{max(dense):>9.1%}")
    for sparsity in SPARSITIES:
        for score in (scores.random(), scores.magnitude(), relative_magnitude()):
            found = []
            for seed in SEEDS:  # the same start, data, steps and seeds for every score
                model = copy.deepcopy(trained[seed])
                found.append(train(model, data[seed], seed + 1000, score, sparsity))
            row = f"{score.name:20}{sparsity:>9.0%}{mean(found):>10.1%}"
            print(f"{row}{min(found):>9.1%}{max(found):>9.1%}")


if __name__ == "__main__":
    main()

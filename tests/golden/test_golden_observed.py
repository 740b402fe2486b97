"""Scores that observe the training: refused without one, and every step seen in a procedure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import combine, methods, scores
from prunus.errors import SignalError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "method",
    [
        methods.total_change(0.5, 10),
        methods.movement(0.5, 10),
        combine.by_site({"0": methods.movement(0.5, 10), "*": methods.one_shot_magnitude(0.5)}),
    ],
)
def test_prune_refuses_what_learns_from_training(method):
    with pytest.raises(SignalError, match="attach it"):
        pr.prune(network(), method, batches=[torch.randn(4, 6)], loss=lambda m, b: m(b).sum())


def test_movement_sees_every_step_of_the_training():
    model, sums = network(), {}
    data = torch.randn(5, 12, 6, generator=torch.Generator().manual_seed(1))

    def train(model, optimizer, start):
        for batch in data if start == 0 else data[:0]:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            for name, p in model.named_parameters():
                if p.ndim == 2:
                    sums[name] = sums.get(name, 0) - p.grad.double() * p.detach().double()
            optimizer.step()

    tickets = methods.train_prune_finetune(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        train,
        sparsity=0.5,
        fine_tune=lambda *_: None,
        score=scores.movement(),
    )
    every = torch.cat([s.flatten() for s in sums.values()])
    limit = every.sort(descending=True).values[len(every) // 2 - 1]
    for name, mask in tickets[-1].masks.items():
        assert torch.equal(mask, sums[name] >= limit)


def test_total_change_leaves_every_layer_some_weights():
    model = network()
    data = torch.randn(5, 12, 6, generator=torch.Generator().manual_seed(1))

    def train(model, optimizer, start):
        for batch in data:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    tickets = methods.train_prune_finetune(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        train,
        sparsity=0.5,
        rounds=2,
        fine_tune=train,
        score=scores.total_change(),
    )
    kept = [int(mask.sum()) for mask in tickets[-1].masks.values()]
    assert sum(kept) == 36
    assert min(kept) > 0

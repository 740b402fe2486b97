"""A weight that wakes up in deep rewiring learns before it is judged."""

from __future__ import annotations

import torch
from torch import nn

import prunus as pr
from prunus.training import dynamic, recipes
from prunus.training.walks import signs, walk


def test_a_woken_weight_stays_where_its_first_gradient_pulls_it_its_way():
    places = torch.arange(6)
    sign = signs(places, 1, "a").double()
    held = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.05, 0.5]).double() * sign
    grad = torch.tensor([-2.0, 2.0, 0.0, 9.0, -9.0, 0.0]).double() * sign
    values, drop, grow = walk({"a": (held, places, 9)}, {"a": grad}, 0.1, 0.1, 0.0, 5, 1)["a"]
    # 0 - 0.1 + 0.2 stays; 0 - 0.1 - 0.2 and 0 - 0.1 fall; others are judged without the gradient.
    assert drop.tolist() == [False, True, True, False, True, False]
    assert grow == 3
    torch.testing.assert_close(
        values[[0, 3, 5]], torch.tensor([0, 0.4, 0.4]).double() * sign[[0, 3, 5]]
    )


def test_woken_weights_survive_and_learn_in_a_training_run():
    torch.manual_seed(0)
    model = pr.sparse_training(
        nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 1)), 0.5, allocation=pr.allocations.uniform()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = {i: model[i].mask() for i in (0, 1)}
    dynamic(model, optimizer, recipes.deep_rewiring(60, lr=0.05, l1=0.1))
    for step in range(60):
        x = torch.randn(32, 20, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    woken = [(model[i].dense_weight() != 0) & ~first[i] for i in (0, 1)]
    assert sum(int(w.sum()) for w in woken) > 20

"""Methods whose schedule is the paper's: what they keep at every step, derived in plain Python."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr


def still(method, steps: int) -> list[torch.Tensor]:
    """Return |w| that is left after each step of a training that changes nothing."""
    torch.manual_seed(0)
    model = nn.Linear(20, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pr.attach(method, model, optimizer)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 20)).sum().backward()
        optimizer.step()
        seen.append(model.weight.detach().clone())
    return seen


def dense() -> torch.Tensor:
    torch.manual_seed(0)
    return nn.Linear(20, 10, bias=False).weight.detach()


def test_gradual_magnitude_follows_its_cubic_ramp():
    method = pr.methods.gradual_magnitude(0.9, 20, begin=2, end=12, every=2)
    order = dense().abs().flatten().argsort().tolist()
    for step, weight in enumerate(still(method, 20)):
        last = min(12, step - step % 2)
        share = 0.0 if step < 2 else 0.9 * (1 - (1 - (last - 2) / 10) ** 3)
        off = set(weight.flatten().eq(0).nonzero().flatten().tolist())
        assert len(off) == pytest.approx(200 * share, abs=1.0)
        assert off == set(order[: len(off)])


def test_woodfisher_of_one_block_is_optimal_brain_surgery():
    torch.manual_seed(2)
    model = nn.Linear(4, 1, bias=False).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    w = model.weight.detach().clone().flatten()
    grads = x * (2 * (x @ w))[:, None]  # of (x w)^2
    h = grads.T @ grads / 9 + 1e-5 * torch.eye(4, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    q = int((w.square() / inverse.diagonal()).argmin())
    expected = w - w[q] / inverse[q, q] * inverse[:, q]
    pr.prune(
        model,
        pr.methods.woodfisher(0.25),
        batches=[x],
        loss=lambda m, b: m(b).square().sum(1).mean(),
    )
    assert model.weight[0, q] == 0
    assert torch.allclose(model.weight.detach().flatten(), expected, rtol=1e-6)

"""What was made fast gives what the plain operations give, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import prunus as pr
from prunus import methods, select

ODD = [0.0, -0.0, 1.5, -2.0, math.inf, -math.inf, math.nan, 1e-40]
KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STEPS = 16


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([*tensor.reshape(-1)]).view(torch.uint8)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 999)
)
def test_clearing_is_filling_whatever_was_there(kind, rows, columns, turned, seed):
    torch.manual_seed(seed)
    a, b = (torch.tensor(ODD)[torch.randint(8, (rows, columns))].to(kind) for _ in range(2))
    mask = torch.rand(rows, columns) < 0.5
    if turned:
        a, b, mask = a.t(), b.t(), mask.t()
    filled = a.masked_fill(~mask, 0)
    assert torch.equal(bits(select.only(a, mask)), bits(filled))
    assert torch.equal(bits(select.either(mask, a, b)), bits(torch.where(mask, a, b)))
    leaf = nn.Parameter(a.clone())
    with torch.no_grad():
        select.clear(leaf, ~mask)
    assert torch.equal(bits(leaf.detach()), bits(filled))
    assert leaf.requires_grad


def plain(patch) -> None:
    """Select and clear as torch spells it."""
    patch.setattr(select, "only", lambda t, mask: t.masked_fill(~mask, 0))
    patch.setattr(select, "clear", lambda t, off: t.masked_fill_(off, 0))
    patch.setattr(select, "either", torch.where)

    def keep_top(scores, k):
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :k], True)

    patch.setattr(select, "keep_top", keep_top)


def trained(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 120), nn.ReLU(), nn.Linear(120, 6)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    given_ = {"lr": 0.1, "l1": 0.05} if name == "deep_rewiring" else {}
    attached = pr.attach(getattr(methods, name)(0.8, STEPS, **given_), model, optimizer, seed=3)
    seen = []
    for step in range(STEPS):
        x = torch.randn(16, 80, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :6].argmax(1)).backward()
        optimizer.step()
        seen += [mask.clone() for mask in attached.masks.values()]
        seen += [p.detach().clone() for p in model.parameters()]
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["top_kast", "deep_rewiring", "dynamic_surgery", "global_sparse_momentum", "rigl", "granet"],
)
def test_trainings_are_those_of_the_plain_operations(name, dtype, monkeypatch):
    fast = trained(name, dtype)
    plain(monkeypatch)
    slow = trained(name, dtype)
    assert len(fast) == len(slow) > STEPS
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_a_row_in_one_piece_is_the_stable_sort_with_and_without_ties():
    torch.manual_seed(0)
    for scores in (torch.randn(1, 9000), torch.randint(0, 5, (1, 9000)).float()):
        order = scores.sort(dim=1, descending=True, stable=True).indices
        for k in (1, 17, 4000, 8999):
            expected = torch.zeros(1, 9000, dtype=torch.bool).scatter_(1, order[:, :k], True)
            assert torch.equal(select.keep_top(scores, k), expected)

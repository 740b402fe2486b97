"""Growth with n:m: what a group drops it grows itself, against a brute-force search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from prunus import allocations, attach, methods, structures
from prunus.compose.within import exchange
from prunus.errors import CompositionError


def expected(on, scores, ranking, turnover):
    """Take the lowest kept unit of all groups, one after the other, while its group has room."""
    wanted, width = int(turnover * int(on.sum()) + 1e-6), on.shape[1]
    room = width - int(on.sum(1)[0])
    units = [(float(scores[g, u]), -(g * width + u)) for g, u in on.nonzero().tolist()]
    dropped = [0] * len(on)
    after = on.clone()
    for _, place in sorted(units):
        g, u = divmod(-place, width)
        if sum(dropped) < wanted and dropped[g] < room:
            after[g, u] = False
            dropped[g] += 1
    for g, count in enumerate(dropped):
        free = [(-float(ranking[g, u]), u) for u in range(width) if not on[g, u]]
        for _, u in sorted(free)[:count]:
            after[g, u] = True
    return after


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.floats(0, 1), st.integers(0, 999)
)
def test_exchange_is_the_brute_force_search(groups, kept, free, turnover, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(groups, kept + free, generator=generator)
    on = draw.argsort(1).argsort(1) < kept
    # Few values: ties.
    scores = torch.randint(0, 4, on.shape, generator=generator).float()
    ranking = torch.randint(0, 4, on.shape, generator=generator).float()
    found = exchange(on, scores, ranking, turnover)
    assert torch.equal(found, expected(on, scores, ranking, turnover))
    assert (found.sum(1) == kept).all()


@pytest.mark.parametrize("structure", [structures.n_of_m(2, 4), structures.n_of_m(1, 8)])
@pytest.mark.parametrize("method", [methods.rigl, methods.set_, methods.mest])
def test_every_group_keeps_its_count_while_it_grows(method, structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    share = allocations.uniform()
    given = {"every": 2, "structure": structure, "allocation": share}
    attached = attach(method(structure.pinned, 40, **given), model, optimizer)
    seen = []
    for step in range(12):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
        for mask in attached.masks.values():
            units = structure.reduce(mask.float())
            assert (units.sum(1) == round((1 - structure.pinned) * units.shape[1])).all()
        seen.append(attached.masks["0.weight"].clone())
    assert not torch.equal(seen[0], seen[-1])
    assert torch.equal(model[0].weight != 0, model[0].weight * seen[-1] != 0)


def test_momentum_growth_keeps_its_groups_or_says_that_it_cannot():
    with pytest.raises(CompositionError, match="redistribute=False"):
        methods.sparse_momentum(0.5, 10, structure=structures.n_of_m(2, 4))

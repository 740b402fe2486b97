"""Lottery tickets against a loop by hand: masks and final weights are equal."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from prunus import methods
from prunus.errors import ValueRangeError

STEPS, ROUNDS, SPARSITY = 12, 3, 0.8


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 2))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)


def loss_of(model, step):
    x, y = batch(step)
    return (model(x) - y).square().mean()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, optimizer, start):
    for step in range(start, STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
    return loss.item()


def by_hand(rewind_step):
    """Masked training written out: gradients and weights are multiplied by the mask."""
    model = network()
    weights = {"0.weight": model[0].weight, "3.weight": model[3].weight}
    masks = {name: torch.ones_like(w) for name, w in weights.items()}
    start, history = None, []
    for done in range(ROUNDS + 1):
        optimizer = optimizer_of(model)
        if done:
            model.load_state_dict(start)
            with torch.no_grad():
                for name, w in weights.items():
                    w.mul_(masks[name])
        for step in range(rewind_step if done else 0, STEPS):
            if not done and step == rewind_step:
                start = {k: v.clone() for k, v in model.state_dict().items()}
            optimizer.zero_grad()
            loss_of(model, step).backward()
            for name, w in weights.items():
                w.grad.mul_(masks[name])
            optimizer.step()
            with torch.no_grad():
                for name, w in weights.items():
                    w.mul_(masks[name])
        history.append({name: mask.bool().clone() for name, mask in masks.items()})
        if done < ROUNDS:
            pool = torch.cat(
                [w.detach().abs().where(masks[n] > 0, -1.0).reshape(-1) for n, w in weights.items()]
            )
            keep = round(len(pool) * (1 - SPARSITY) ** ((done + 1) / ROUNDS))
            flat = torch.zeros(len(pool))
            flat[pool.argsort(descending=True, stable=True)[:keep]] = 1.0
            first = weights["0.weight"].numel()
            masks = {
                "0.weight": flat[:first].reshape(10, 6),
                "3.weight": flat[first:].reshape(2, 10),
            }
    return model, history


@pytest.mark.parametrize("rewind_step", [0, 4])
def test_tickets_equal_a_loop_by_hand(rewind_step):
    expected, history = by_hand(rewind_step)
    model, seen = network(), []
    tickets = methods.lottery_ticket(
        model,
        optimizer_of,
        train,
        sparsity=SPARSITY,
        rounds=ROUNDS,
        rewind_step=rewind_step,
        on_round=seen.append,
    )
    assert tickets == seen
    assert [t.round for t in tickets] == [0, 1, 2, 3]
    assert tickets[0].sparsity == 0
    assert tickets[-1].sparsity == pytest.approx(SPARSITY, abs=1 / 80)
    for ticket, masks in zip(tickets, history, strict=True):
        for name, mask in masks.items():
            found = ticket.masks.get(name, torch.ones_like(mask))
            assert torch.equal(found, mask), (ticket.round, name)
    for got, want in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert all(0 < ticket.result < 100 for ticket in tickets)


def test_tickets_are_nested():
    tickets = methods.lottery_ticket(network(), optimizer_of, train, sparsity=0.9, rounds=4)
    for before, after in itertools.pairwise(tickets[1:]):
        for name, mask in after.masks.items():
            assert not bool((mask & ~before.masks[name]).any())


def test_training_that_stops_before_the_rewind_step_is_refused():
    with pytest.raises(ValueRangeError, match="step 50"):
        methods.lottery_ticket(
            network(), optimizer_of, train, sparsity=0.5, rounds=1, rewind_step=50
        )

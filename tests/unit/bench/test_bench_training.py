from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prunus.bench import Dataset, batches, digits, fit, mlp, shift, steps_per_epoch
from prunus.errors import ValueRangeError
from prunus.metrics import accuracy


@pytest.fixture
def tiny() -> Dataset:
    stream = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 1, 4, 4, generator=stream)
    targets = (inputs.mean(dim=(1, 2, 3)) > 0).long()
    return Dataset(inputs, targets, inputs, targets, 2, "tiny")


def train(dataset, **options):
    model = nn.Sequential(nn.Dropout(0.5), mlp(16, (8,), 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = fit(model, optimizer, dataset, **{"epochs": 2, "batch_size": 8, "seed": 1, **options})
    return losses, nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("augment", [None, shift])
def test_same_seed_same_weights_bit_for_bit(tiny, augment):
    state = torch.get_rng_state()
    first = train(tiny, augment=augment)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)  # the global random state must not matter
    second, other = train(tiny, augment=augment), train(tiny, augment=augment, seed=2)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


def test_the_loop_is_plain_sgd(tiny):
    model, twin = mlp(16, (8,), 2), mlp(16, (8,), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, optimizer, tiny, epochs=2, batch_size=8, seed=1, schedule="linear")
    step = 0
    for epoch in range(2):
        for inputs, targets in batches(tiny.train_inputs, tiny.train_targets, 8, 1, epoch):
            loss = nn.functional.cross_entropy(twin(inputs), targets)
            gradients = torch.autograd.grad(loss, list(twin.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                    parameter -= 0.1 * (1 - step / 6) * gradient
            step += 1
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, expected)


def test_learning_rates_follow_the_schedule_per_group_and_come_back(tiny):
    model = mlp(16, (8,), 2)
    first, last = model.layers.fc1.parameters(), model.layers.fc2.parameters()
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.4}, {"params": last, "lr": 0.1}])
    seen = []

    def on_step(step: int, total: int) -> None:
        seen.append((step, total, *(group["lr"] for group in optimizer.param_groups)))

    fit(model, optimizer, tiny, epochs=2, batch_size=10, seed=0, on_step=on_step)
    factors = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    expected = [(i + 1, 4, 0.4 * f, 0.1 * f) for i, f in enumerate(factors)]
    assert [tuple(pytest.approx(x) for x in row) for row in expected] == seen
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1]


def test_label_smoothing_reaches_the_loss(tiny):
    assert train(tiny, label_smoothing=0.2)[0] != train(tiny)[0]


def test_steps_and_arguments(tiny):
    assert steps_per_epoch(tiny, 8) == 3
    assert len(train(tiny, epochs=3)[0]) == 9
    assert train(tiny, epochs=0)[0] == []
    for wrong in ({"schedule": "step"}, {"epochs": -1}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueRangeError):
            train(tiny, **wrong)
    with pytest.raises(ValueRangeError, match="batch_size"):
        steps_per_epoch(tiny, 0)


def test_the_mlp_learns_the_digits():
    data = digits()
    model = mlp(hidden=(128,), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = fit(model, optimizer, data, epochs=5, batch_size=64, seed=0)
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    assert accuracy(model, (data.test_inputs, data.test_targets)).value > 0.95

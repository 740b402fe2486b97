"""Moving connections of packed layers, and training against the masked simulation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunus import attach, methods
from prunus.errors import AttachError, NotFiniteError, SiteError, TargetError, ValueRangeError
from prunus.training import (
    LargestGradients,
    TrainableConv2d,
    TrainableLinear,
    dynamic,
    rewire,
    sparse_training,
    to_dense,
    tune,
)
from prunus.training import products as products_
from prunus.training.candidates import free_places


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 20), nn.ReLU(),
        nn.Linear(20, 4),
    )  # fmt: skip


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 5, 5, generator=generator)
    return x, torch.randint(0, 4, (16,), generator=generator)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x, y = batch(step)
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_static_training_is_the_masked_simulation(kind):
    masked = net()
    make = {
        "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
        "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    }[kind]
    optimizer = make(masked)
    attached = attach(methods.rigl(0.8, 1000, every=500), masked, optimizer, seed=3)
    packed = sparse_training(net(), 0.8, seed=3)
    for name, mask in attached.masks.items():
        layer = packed.get_submodule(name.rpartition(".")[0])
        assert torch.equal(layer.mask(), mask)
    train(masked, optimizer, 20)
    train(packed, make(packed), 20)
    dense = to_dense(packed)
    for (name, left), right in zip(masked.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-3, atol=1e-4, msg=name)


def test_rigl_on_packed_layers_is_rigl_on_masks():
    masked, model = net().double(), net().double()
    optimizer = torch.optim.AdamW(masked.parameters(), lr=0.01)
    attached = attach(methods.rigl(0.8, 40, every=5, stop=0.75), masked, optimizer, seed=3)
    packed = sparse_training(model, 0.8, seed=3)
    other = torch.optim.AdamW(packed.parameters(), lr=0.01)
    driver = dynamic(packed, other, 40, every=5, stop=0.75)
    start = {n: m.clone() for n, m in attached.masks.items()}
    train(masked, optimizer, 35)
    train(packed, other, 35)
    assert driver.step == 35
    for name, mask in attached.masks.items():
        layer = packed.get_submodule(name.rpartition(".")[0])
        assert torch.equal(layer.mask(), mask), name
        assert not torch.equal(mask, start[name])
        torch.testing.assert_close(layer.dense_weight(), masked.get_parameter(name).detach())
        moment = torch.zeros(mask.shape, dtype=torch.float64)
        moment[layer.mask()] = other.state[layer.values]["exp_avg"]
        expected = optimizer.state[masked.get_parameter(name)]["exp_avg"]
        torch.testing.assert_close(moment, expected)


def test_a_resumed_run_is_the_same_run():
    for grow in ("gradient", "random"):
        results = []
        for interrupt in (None, 9, 10):
            model = sparse_training(net(), 0.8)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            driver = dynamic(model, optimizer, 40, grow=grow, every=5, seed=2)
            if interrupt is not None:
                train(model, optimizer, interrupt)
                saved = copy.deepcopy(
                    (model.state_dict(), optimizer.state_dict(), driver.state_dict())
                )
                model = sparse_training(net(1), 0.8, seed=9)
                model.load_state_dict(saved[0])
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
                optimizer.load_state_dict(saved[1])
                driver = dynamic(model, optimizer, 40, grow=grow, every=5)
                driver.load_state_dict(saved[2])
            train(model, optimizer, 22 - (interrupt or 0), interrupt or 0)
            results.append([p.detach() for p in to_dense(model).parameters()])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rewire_carries_values_moments_and_gradients_by_position():
    layer = TrainableLinear.random(12, 9, 0.7, seed=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    state = optimizer.state[layer.values]
    before = {"values": layer.values.detach().clone(), "grad": layer.values.grad.clone()}
    before |= {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    places, parameter = layer.pattern.places(), layer.values
    drop = torch.zeros(len(places), dtype=torch.bool)
    drop[[1, 5, 6]] = True
    grow = torch.tensor([p for p in range(108) if p not in places.tolist()])[:5]
    rewire(layer, optimizer, drop, grow)
    assert layer.nonzeros == len(places) + 2
    assert layer.values is not parameter  # autograd remembers its size
    assert optimizer.param_groups[0]["params"][0] is layer.values
    assert parameter not in optimizer.state
    state = optimizer.state[layer.values]
    after = {"values": layer.values.detach(), "grad": layer.values.grad}
    after |= {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    for kind, old in before.items():
        table = dict(zip(places[~drop].tolist(), old[~drop].tolist(), strict=True))
        expected = [table.get(p, 0.0) for p in layer.pattern.places().tolist()]
        assert after[kind].tolist() == expected, kind
    layer(torch.randn(4, 12)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueRangeError, match="stored already"):
        rewire(layer, optimizer, drop[:0].new_zeros(layer.nonzeros), layer.pattern.places()[:1])


def test_largest_gradients_are_the_top_of_the_dense_gradient(monkeypatch):
    monkeypatch.setattr(products_, "BLOCK", 100)
    dense_linear, dense_conv = nn.Linear(30, 17), nn.Conv2d(3, 5, 3, padding=1)
    for dense, kind, x in [
        (dense_linear, TrainableLinear, torch.randn(8, 30)),
        (dense_conv, TrainableConv2d, torch.randn(4, 3, 6, 6)),
    ]:
        mask = torch.rand(dense.weight.shape) > 0.8
        with torch.no_grad():
            dense.weight.mul_(mask)
        layer = kind.from_dense(dense.double(), mask)
        layer.watch = found = LargestGradients(layer.pattern, 23)
        x = x.double()
        for module in (dense, layer):
            module(x).square().sum().backward()
        size = dense.weight.grad.abs().masked_fill(mask, -1).reshape(-1).numpy()
        expected = np.sort(np.argsort(-size, kind="stable")[:23])
        assert found.places.tolist() == expected.tolist()


def test_free_places_are_free_distinct_and_uniform():
    layer = TrainableLinear.random(10, 10, 0.7)
    taken, hits = set(layer.pattern.places().tolist()), np.zeros(100)
    for seed in range(600):
        found = free_places(layer.pattern, 20, (seed,)).tolist()
        assert len(set(found)) == 20
        assert not taken & set(found)
        hits[found] += 1
    free = hits[[p for p in range(100) if p not in taken]]
    assert free.mean() == pytest.approx(600 * 20 / 70)
    assert free.min() > 110
    assert free.max() < 240
    assert len(free_places(layer.pattern, 70, (0,))) == 70
    with pytest.raises(ValueRangeError, match="70 places are free"):
        free_places(layer.pattern, 71, (0,))


def test_what_cannot_be_swapped_stays_and_mistakes_are_told():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 3))
    sparse_training(model, 0.5)
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[2], TrainableLinear)
    with pytest.raises(SiteError, match="no Linear or plain"):
        sparse_training(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), 0.5)
    with pytest.raises(TargetError, match="nothing is off"):
        sparse_training(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(SiteError, match="cannot be swapped"):
        sparse_training(net(), masks={"nowhere": torch.ones(1, dtype=torch.bool)})
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(SiteError, match="tied"):
        sparse_training(tied, 0.5)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse_training(model, 0.5)
    with pytest.raises(AttachError, match="make the optimizer"):
        dynamic(model, optimizer, 10)
    attach(methods.rigl(0.5, 10), twin := net(), kept := torch.optim.SGD(twin.parameters(), lr=0.1))
    with pytest.raises(AttachError, match="detach it first"):
        sparse_training(twin, 0.5)
    assert kept is not None


def test_masks_of_another_method_and_zeros_of_a_pruned_model_are_taken():
    model = net()
    kept = {"3.weight": torch.rand(20, 150) > 0.5}
    sparse_training(model, masks=kept)
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model[3].mask(), kept["3.weight"])
    pruned = net()
    with torch.no_grad():
        pruned[5].weight[:, :10] = 0
    x = batch()[0]
    expected = pruned(x)
    sparse_training(pruned)
    assert [type(m).__name__ for m in pruned][::5] == ["Conv2d", "TrainableLinear"]
    torch.testing.assert_close(pruned(x), expected)


def test_tune_measures_both_ways_and_keeps_gradients():
    model = sparse_training(net(), 0.9)
    model(batch()[0]).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    choices = tune(model, batch()[0], repetitions=1)
    assert [c.layer for c in choices] == ["0", "3", "5"]
    assert all("ms" in str(c) for c in choices)
    for choice in choices:
        assert model.get_submodule(choice.layer).native == choice.native
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_is_told():
    layer = TrainableLinear.random(6, 5, 0.5)
    layer.watch = LargestGradients(layer.pattern, 3)
    with pytest.raises(NotFiniteError, match="not finite"):
        layer(torch.full((2, 6), float("nan"))).sum().backward()

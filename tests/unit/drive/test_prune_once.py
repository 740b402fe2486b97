from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prunus import methods, schedules, scores
from prunus.compose import compose
from prunus.core import Schedule, Score, Solver
from prunus.drive import prune
from prunus.errors import NotFiniteError, SignalError, SiteError, TargetError, ValueRangeError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def loss_of(model, batch):
    return model(batch).square().mean()


BATCHES = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_what_is_off_is_zero_and_what_stays_is_as_it_was():
    model = network()
    before = weights_of(model)
    masks = prune(model, methods.one_shot_magnitude(0.75))
    assert sum(int(mask.sum()) for mask in masks.values()) == (128 + 64) // 4
    for name, value in model.state_dict().items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, before[name] * mask)


@pytest.mark.parametrize(
    "method",
    [
        methods.snip(0.9),
        methods.synflow(0.9, rounds=10),
        methods.random_pruning(0.9),
        methods.gradual_magnitude(0.9, 50),
        compose(scores.taylor(), schedule=schedules.iterative(0.9, 3, 2, 4), rounds=2),
    ],
    ids=str,
)
def test_all_updates_run_to_the_end(method):
    model = network()
    prune(model, method, inputs=BATCHES[0], batches=BATCHES, loss=loss_of)
    zeros = sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2]))
    assert abs(zeros - 0.9 * 192) <= 1


def test_a_generator_of_batches_serves_every_round():
    method = compose(scores.taylor(), schedule=schedules.one_shot(0.5), rounds=3)
    first, second = network(), network()
    prune(first, method, batches=(b for b in BATCHES), loss=loss_of)
    prune(second, method, batches=BATCHES, loss=loss_of)
    assert torch.equal(first[0].weight, second[0].weight)


def test_seed_include_and_exclude():
    one, two, other = network(), network(), network()
    prune(one, methods.random_pruning(0.5), seed=1)
    prune(two, methods.random_pruning(0.5), seed=1)
    prune(other, methods.random_pruning(0.5), seed=2, exclude="2")
    assert torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(other[2].weight, network()[2].weight)
    with pytest.raises(SiteError, match="'5'"):
        prune(network(), methods.random_pruning(0.5), include="5")


def test_a_compiled_model_is_pruned_in_place():
    model = network()
    prune(torch.compile(model, backend="eager"), methods.one_shot_magnitude(0.5))
    assert int((model[0].weight == 0).sum()) == 64


def test_tied_weights_are_pruned_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    masks = prune(model, methods.one_shot_magnitude(0.5))
    assert list(masks) == ["0.weight"]
    assert int((model[1].weight == 0).sum()) == 18


class Interruption(BaseException):
    pass


def failing_after(calls, error):
    left = iter(range(calls))

    def value(w, at):
        if next(left, None) is None:
            raise error
        return w.abs()

    return Score("failing", value)


@pytest.mark.parametrize("error", [RuntimeError("boom"), Interruption()])
def test_weights_are_restored_if_a_later_update_fails(error):
    model = network()
    before = weights_of(model)
    method = compose(failing_after(5, error), schedule=schedules.iterative(0.9, 4, 1))
    with pytest.raises(type(error)):
        prune(model, method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rewritten_weights_are_restored_too():
    model = network()
    before = weights_of(model)
    double = Solver("double", lambda w, s, k, st, at: (st.expand(s >= -1, w.shape), w * 2))
    with pytest.raises(TargetError, match=r"asked for a sparsity of 0\.5"):
        prune(model, compose(scores.magnitude(), schedule=schedules.one_shot(0.5), solve=double))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_new_weights_of_a_solver_are_written():
    model = network()
    before = weights_of(model)

    def double(w, given, k, structure, at):
        return structure.expand(given >= given.sort().values[:, -k, None], tuple(w.shape)), w * 2

    method = compose(
        scores.magnitude(), schedule=schedules.one_shot(0.5), solve=Solver("double", double)
    )
    masks = prune(model, method)
    for name, mask in masks.items():
        assert torch.equal(model.state_dict()[name], before[name] * 2 * mask)


def test_a_method_without_an_end_is_refused():
    endless = compose(scores.magnitude(), schedule=Schedule("always", lambda step: 0.5, 0.5))
    with pytest.raises(SignalError, match="never ends by itself: attach it"):
        prune(network(), endless)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, SignalError, "pass batches= and loss="),
        ({"batches": [], "loss": loss_of}, ValueRangeError, "empty"),
        ({"batches": iter(()), "loss": loss_of}, ValueRangeError, "empty"),
    ],
)
def test_data_that_is_missing_or_empty_is_refused_and_changes_nothing(given, error, message):
    model = network()
    before = weights_of(model)
    with pytest.raises(error, match=message):
        prune(model, methods.snip(0.5), **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nan_is_refused_by_name():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"'2\.weight'"):
        prune(model, methods.one_shot_magnitude(0.5))
    with pytest.raises(NotFiniteError, match=r"'2\.weight'"):
        prune(model, methods.fixed())

"""When connections move, when they must not, and what the driver refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunus as pr
from prunus import allocations
from prunus.errors import AttachError
from prunus.training import SparseWeight, dynamic, recipes, tune


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 5)
    )


def begin(sparsity=0.8, recipe=None, kind=torch.optim.SGD, **rest):
    model = pr.sparse_training(network(), sparsity, **rest)
    optimizer = kind(model.parameters(), lr=0.05)
    recipe = recipes.rigl(40, every=3, fraction=0.5) if recipe is None else recipe
    return model, optimizer, dynamic(model, optimizer, recipe)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(16, 20, generator=generator),
        torch.randint(0, 5, (16,), generator=generator),
    )


def train(model, optimizer, first, last):
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def places(model):
    return [m.mask() for m in model.modules() if isinstance(m, SparseWeight)]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def sparsity_of(model):
    held = [m for m in model.modules() if isinstance(m, SparseWeight)]
    kept = sum(int(m.mask().sum()) for m in held)
    return 1 - kept / sum(math.prod(m.shape) for m in held)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("grow", ["gradient", "hebbian", "random"])
def test_a_step_with_a_closure_moves_as_one_without(grow, named):
    recipe = recipes.rigl(40, grow=grow, every=3, fraction=0.5)
    model, optimizer, driver = begin(recipe=recipe)
    twin, other, _ = begin(recipe=recipe)
    start = places(model)
    train(twin, other, 0, 8)
    for step in range(8):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if named else optimizer.step(closure)
        assert loss is not None
    assert driver.step == 8
    assert not same(start, places(model))
    assert same(places(model), places(twin))
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_move_that_no_backward_pass_came_before_is_left_out_with_a_warning():
    model, optimizer, _ = begin()
    train(model, optimizer, 0, 3)
    start = places(model)
    with pytest.warns(UserWarning, match="no backward pass"):
        optimizer.step()
    assert same(start, places(model))


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_that_a_scaler_skips_leaves_the_move_to_the_next_one(micro):
    model, optimizer, driver = begin()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(number, bad=False):
        x, y = batch(number)
        optimizer.zero_grad()
        for part, wanted in zip(x.chunk(micro), y.chunk(micro), strict=True):
            loss = F.cross_entropy(model(part), wanted) / micro
            scaler.scale(loss * math.inf if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()

    twin, other, _ = begin()
    for number in range(6):
        step(number)
    train(twin, other, 0, 6)
    start = places(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(100, bad=True)  # before a step that is due
        assert driver.step == 6
        assert same(start, places(model))
        step(6)
    assert not same(start, places(model))
    if micro == 1:
        train(twin, other, 6, 7)
        assert same(places(model), places(twin))


def test_gradients_that_are_no_numbers_move_nothing_and_warn():
    model, optimizer, _ = begin()
    train(model, optimizer, 0, 3)
    start = places(model)
    optimizer.zero_grad()
    (model(batch(3)[0]).sum() * math.nan).backward()
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert same(start, places(model))


@pytest.mark.parametrize("between", ["cleared", "zeroed", "tuned", "grad"])
def test_passes_for_another_purpose_between_steps_are_forgotten(between):
    model, optimizer, _ = begin()
    twin, other, _ = begin()
    for step in range(10):
        if between == "tuned" and step in (2, 3):
            tune(model, batch(200)[0], repetitions=1)
            for layer in model.modules():
                if isinstance(layer, SparseWeight):
                    layer.native = True
        elif step in (2, 3):
            loss = F.cross_entropy(model(batch(100)[0]), batch(100)[1])
            if between == "grad":
                with torch.no_grad():
                    model(batch(100)[0])
            else:
                loss.backward()
                optimizer.zero_grad(set_to_none=between == "cleared")
        train(model, optimizer, step, step + 1)
        train(twin, other, step, step + 1)
        assert same(places(model), places(twin))


def test_a_checkpoint_loaded_into_a_running_training():
    model, optimizer, driver = begin()
    train(model, optimizer, 0, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), driver.state_dict()))
    train(model, optimizer, 5, 12)
    wanted = places(model), [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    driver.load_state_dict(saved[2])
    train(model, optimizer, 5, 12)
    assert same(wanted[0], places(model))
    assert same(wanted[1], model.parameters())


def test_a_topology_loaded_just_before_a_move_waits_for_a_pass():
    model, optimizer, driver = begin()
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, 0, 6)
    x, y = batch(6)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model.load_state_dict(saved)
    with pytest.warns(UserWarning, match="another topology"):
        optimizer.step()
    loaded = places(model)
    train(model, optimizer, 7, 10)
    assert driver.step == 10
    assert not same(loaded, places(model))


@pytest.mark.parametrize("steps", [2, 3])  # the fourth step moves, the third does not
def test_another_size_loaded_beside_old_moments_is_told(steps):
    model, optimizer, _ = begin(kind=torch.optim.Adam)
    train(model, optimizer, 0, steps)
    other = pr.sparse_training(network(), 0.6)
    model.load_state_dict(other.state_dict())
    x, y = batch(3)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(AttachError, match=r"'0'.*exp_avg.*optimizer's state"):
        optimizer.step()


@pytest.mark.parametrize("method", ["granet", "nest", "top_kast", "dynamic_reparameterization"])
def test_targets_are_met_where_erk_leaves_layers_full(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 100), nn.Linear(100, 5))
    pr.sparse_training(model, 0.5, allocation=allocations.erk())
    full = [m.nonzeros == math.prod(m.shape) for m in model.modules() if hasattr(m, "nonzeros")]
    assert any(full)
    start = sparsity_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    made = {
        "granet": lambda: recipes.granet(0.95, 60, every=5),
        "nest": lambda: recipes.nest(0.95, 60, every=5, seed_sparsity=0.5, peak_sparsity=0.4),
        "top_kast": lambda: recipes.top_kast(0.95, 60),
        "dynamic_reparameterization": lambda: recipes.dynamic_reparameterization(60, every=5),
    }[method]()
    dynamic(model, optimizer, made)
    train(model, optimizer, 0, 60)
    wanted = start if method == "dynamic_reparameterization" else 0.95
    assert abs(sparsity_of(model) - wanted) < 1e-3


@pytest.mark.parametrize("conv", [{}, {"stride": 2, "groups": 2}, {"padding": 1, "dilation": 2}])
def test_full_layers_compute_as_dense_ones(conv):
    torch.manual_seed(0)
    for dense, shape in (
        (nn.Linear(12, 7), (5, 12)),
        (nn.Conv2d(4, 6, 3, **conv), (2, 4, 9, 9)),
    ):
        dense = dense.double()
        mask = torch.ones_like(dense.weight, dtype=torch.bool)
        packed = pr.sparse_training(nn.Sequential(dense), masks={"0.weight": mask})[0]
        twin = packed.to_dense()
        assert packed.pattern.full
        x = torch.randn(shape, dtype=torch.float64)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = packed(left)
        g = torch.randn_like(y)
        y.backward(g)
        twin(right).backward(g)
        torch.testing.assert_close(y, twin(x))
        torch.testing.assert_close(left.grad, right.grad)
        torch.testing.assert_close(packed.values.grad, twin.weight.grad.reshape(-1))


def test_watched_layers_are_copied_and_saved_without_their_watch():
    model, optimizer, _ = begin(recipe=recipes.rigl(40, grow="hebbian", every=3, fraction=0.5))
    twin, other, _ = begin(recipe=recipes.rigl(40, grow="hebbian", every=3, fraction=0.5))
    for step in range(7):
        twin_of = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        torch.save(model, io.BytesIO())
        x, _ = batch(step)
        torch.testing.assert_close(again(x * 7), twin_of(x * 7))  # not seen by the driver
        train(model, optimizer, step, step + 1)
        train(twin, other, step, step + 1)
    assert same(places(model), places(twin))


def test_two_drivers_of_one_optimizer_are_refused_until_the_first_is_detached():
    model, optimizer, driver = begin()
    with pytest.raises(AttachError, match="detach"):
        dynamic(model, optimizer, recipes.set_(40))
    driver.detach()
    dynamic(model, optimizer, recipes.set_(40))


def test_lbfgs_is_refused():
    model = pr.sparse_training(network(), 0.8)
    with pytest.raises(AttachError, match="LBFGS"):
        dynamic(model, torch.optim.LBFGS(model.parameters()), 40)

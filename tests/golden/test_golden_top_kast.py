"""Top-KAST: its sets, its shrinkage, and training as a plain loop over theta."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from growth_case import SHAPES, SITES, best, draw, model_and_data
from torch.nn import functional as F

from prunus import attach, combine, methods
from prunus.core import Signals
from prunus.errors import CompositionError
from prunus.kinds import RESERVE


def test_top_kast_sets_and_shrinkage():
    method = methods.top_kast(0.75, 10, backward=0.5, decay=0.01)
    state = method.init(SITES, draw(0), 0)
    result = method.update(state, SITES, draw(0), Signals())
    for n, shape in SHAPES.items():
        w, size = draw(0)[n].numpy(), math.prod(shape)
        full = np.ones(shape, bool)
        a, b = result.state.masks[n].numpy(), result.state.trained[n].numpy()
        assert abs(a.sum() - 0.25 * size) < 1
        assert abs(b.sum() - 0.5 * size) < 1
        assert np.array_equal(a, best(np.abs(w), full, int(a.sum())))
        assert np.array_equal(b, best(np.abs(w), full, int(b.sum())))
        theta = w * np.where(a, 0.99, np.where(b, 1 - 0.01 / 0.25, 1.0))
        np.testing.assert_allclose(result.weights[n].numpy(), theta * a)
        np.testing.assert_allclose(result.state.statistics[RESERVE][n].numpy(), theta * ~a)


@pytest.mark.parametrize("kind", ["sgd", "adam", "closure"])
def test_top_kast_in_training_is_a_loop_over_theta(kind):
    model, x, y = model_and_data()
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin, _, _ = model_and_data()
    optimizer, other = optimizer_of(kind, model), optimizer_of(kind, twin)
    attached = attach(methods.top_kast(0.75, 100, decay=0.003), model, optimizer)
    sets = {}
    for step in range(8):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if kind == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

        # the loop: dense theta in `twin`, sets chosen before each step
        for name in ("0.weight", "2.weight"):
            if step == 0:
                sets[name] = choose(theta[name])
                theta[name] = shrink(theta[name], *sets[name])
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.copy_(theta[name] * sets[name][0] if name in sets else theta[name])
        other.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name in sets:
                    if step:
                        sets[name] = choose(theta[name])
                        theta[name] = shrink(theta[name], *sets[name])
                        lost = ~sets[name][1]
                        for value in other.state[p].values():
                            if value.shape == p.shape:
                                value.masked_fill_(lost, 0)
                    p.grad.mul_(sets[name][1])
                    p.copy_(theta[name])
        other.step()
        for name, p in twin.named_parameters():
            after = p.detach().clone()
            if name in sets:
                after = torch.where(sets[name][1], after, theta[name])
            theta[name] = after
        for name, p in model.named_parameters():
            expected = theta[name] * sets[name][0] if name in sets else theta[name]
            torch.testing.assert_close(p.detach(), expected, msg=f"{name} at step {step}")
    for name in sets:
        full = model.get_parameter(name) + attached.state.statistics[RESERVE][name]
        torch.testing.assert_close(full.detach(), theta[name])


def optimizer_of(kind, model):
    if kind == "adam":
        return torch.optim.AdamW(model.parameters(), lr=0.02)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def choose(theta):
    size = theta.numel()
    order = theta.abs().reshape(-1).argsort(descending=True, stable=True)
    a, b = torch.zeros(2, size, dtype=torch.bool)
    a[order[: round(0.25 * size)]] = True
    b[order[: round(0.5 * size)]] = True
    return a.reshape(theta.shape), b.reshape(theta.shape)


def shrink(theta, a, b):
    return theta * (1 - 0.003 * (a + (b & ~a) / 0.25).double())


def test_top_kast_resumes_exactly():
    runs = []
    for interrupt in (None, 4):
        model, x, y = model_and_data(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        attached = attach(methods.top_kast(0.7, 100, every=3), model, optimizer)
        for step in range(9):
            if step == interrupt:
                saved = (model.state_dict(), optimizer.state_dict())
                model, _, _ = model_and_data(4)
                model.load_state_dict(saved[0])
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
                optimizer.load_state_dict(saved[1])
                attached = attach(methods.top_kast(0.7, 100, every=3), model, optimizer)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert attached.sparsity == pytest.approx(0.7, abs=0.01)
        runs.append([p.detach().clone() for p in model.parameters()])
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left, right)


def test_top_kast_is_not_combined():
    model, _, _ = model_and_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CompositionError, match="cannot be combined"):
        attach(combine.by_site({"*": methods.top_kast(0.5, 10)}), model, optimizer)

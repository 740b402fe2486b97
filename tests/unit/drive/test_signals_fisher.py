"""Gradients of single examples and second derivatives against autograd on the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import functional_call, grad

from prunus.drive import Sources, collect
from prunus.drive.signals import hessian as hessian_
from prunus.drive.signals.fisher import examples
from prunus.errors import ShapeError, SignalError
from prunus.kinds import GRADIENT_SQUARE, GRADIENTS, HESSIAN, HESSIAN_DIAGONAL, HUTCHINSON
from prunus.sites import find, parameters


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))
    return model.double()


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(count, seed=0):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=make).double(), torch.arange(count) % 2


def signal(kind, model, batches, **given):
    found = find(model)
    all_ = Sources(model, found, parameters(model, found), {}, batches=batches, **given)
    return {site.name: collect(frozenset({kind}), all_).at(site.name)[kind] for site in found}


def test_per_example_gradients_and_their_squares():
    model = network().train()
    batches = [data(4), data(3, seed=1)]
    got = signal(GRADIENTS, model, batches, loss=loss_of)
    squares = signal(GRADIENT_SQUARE, model, batches, loss=loss_of)
    model.eval()
    state = {k: v.detach() for k, v in model.named_parameters()}
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))

    def loss(state, x, y):
        return nn.functional.cross_entropy(functional_call(model, state, (x[None],)), y[None])

    expected = torch.func.vmap(grad(loss), (None, 0, 0))(state, x, y)
    for name in got:
        torch.testing.assert_close(got[name], expected[name])
        torch.testing.assert_close(squares[name], expected[name].square().mean(0))


def full_hessians(model, batches):
    """Per site, by torch.autograd.functional, mean over the batches."""
    model.eval()
    state = {k: v.detach() for k, v in model.named_parameters()}
    found = {}
    for site in find(model):

        def loss(w, batch, name=site.name):
            new = {**state, name: w}
            return nn.functional.cross_entropy(functional_call(model, new, (batch[0],)), batch[1])

        parts = [
            autograd_hessian(lambda w, b=b: loss(w, b), state[site.name]).reshape(
                site.size, site.size
            )
            for b in batches
        ]
        found[site.name] = torch.stack(parts).mean(0)
    return found


def test_exact_second_derivatives():
    model, batches = network(), [data(4), data(3, seed=1)]
    got, diagonal = (
        signal(kind, model, batches, loss=loss_of) for kind in (HESSIAN, HESSIAN_DIAGONAL)
    )
    for name, expected in full_hessians(model, batches).items():
        torch.testing.assert_close(got[name], expected)
        torch.testing.assert_close(diagonal[name].flatten(), expected.diagonal())


def test_hutchinson_is_exact_for_a_diagonal_hessian_and_unbiased_else(monkeypatch):
    model = nn.Linear(3, 1, bias=False).double()
    eye = lambda m, x: (x * m.weight.flatten().square()).sum() / 2  # noqa: E731
    x = torch.tensor([1.0, 2.0, 3.0]).double()
    torch.testing.assert_close(signal(HUTCHINSON, model, [x], loss=eye)["weight"][0], x)
    monkeypatch.setattr(hessian_, "PROBES", 3000)
    model, batches = network(), [data(5)]
    got = signal(HUTCHINSON, model, batches, loss=loss_of)
    for name, expected in full_hessians(model, batches).items():
        error = got[name].flatten() - expected.diagonal()
        assert error.norm() < 0.25 * expected.diagonal().norm()


def test_a_linear_loss_has_no_curvature():
    model = nn.Linear(2, 2, bias=False)
    for kind in (HESSIAN, HESSIAN_DIAGONAL, HUTCHINSON):
        found = signal(kind, model, [torch.ones(1, 2)], loss=lambda m, b: m(b).sum())
        assert not bool(found["weight"].any())


def test_examples_of_any_batch():
    x, y = torch.arange(6).reshape(3, 2), torch.arange(3)
    assert [int(one) for one in examples(y)] == [0, 1, 2]
    parts = list(examples({"x": x, "pair": [y, torch.tensor(7)], "flag": True}))
    assert len(parts) == 3
    assert torch.equal(parts[1]["x"], x[1:2])
    assert parts[2]["pair"][0].tolist() == [2]
    assert int(parts[2]["pair"][1]) == 7
    assert parts[0]["flag"] is True
    with pytest.raises(ShapeError, match=r"lengths are \[2, 3\]"):
        list(examples((x.T, y)))


@pytest.mark.parametrize("kind", [GRADIENTS, GRADIENT_SQUARE, HESSIAN, HUTCHINSON])
def test_derivatives_that_cannot_be_had_are_refused(kind, monkeypatch):
    with pytest.raises(SignalError, match="pass batches= and loss="):
        signal(kind, network(), [data(2)])
    model = network()
    model[3].weight.requires_grad_(False)
    with pytest.raises(SignalError, match=r"'3\.weight'.*is frozen"):
        signal(kind, model, [data(2)], loss=loss_of)
    monkeypatch.setattr(hessian_, "LIMIT", 19)
    if kind == HESSIAN:
        with pytest.raises(SignalError, match="for each of 20 weights, more than 19"):
            signal(kind, network(), [data(2)], loss=loss_of)

"""EigenDamage against the rotation and the Fisher cost worked out by hand, in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from prunus.drive import Sources, collect, eigendamage
from prunus.errors import SiteError, TargetError
from prunus.kinds import GRAM, OUTPUT_GRAM
from prunus.sites import find, parameters


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6)
    ).double()


def data():
    torch.manual_seed(1)
    return [(torch.randn(40, 3, 4, 4).double(), torch.arange(40) % 6)]


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def signals_of(model):
    found = find(model)
    given = Sources(model, found, parameters(model, found), {}, None, data(), loss)
    return collect(frozenset({GRAM, OUTPUT_GRAM}), given)


def test_with_nothing_removed_the_network_computes_the_same():
    model = net()
    before = model(data()[0][0]).detach()
    found = eigendamage(model, 0.0, batches=data(), loss=loss)
    assert {name: r.rank for name, r in found.items()} == {"0.weight": None, "3.weight": None}
    torch.testing.assert_close(model(data()[0][0]).detach(), before)


def test_a_linear_layer_keeps_the_rows_and_columns_that_cost_most():
    model = net()
    dense = copy.deepcopy(model)
    at = signals_of(model).at("3.weight")
    found = eigendamage(model, 0.5, batches=data(), loss=loss, include="3.weight")["3.weight"]
    assert found.rank is not None
    columns, rows = found.rank
    assert found.after == 32 * columns + rows * columns + 6 * rows <= 0.5 * 192
    w = dense[3].weight.detach().numpy()
    a, qa = np.linalg.eigh(at[GRAM][0].numpy())
    g, qg = np.linalg.eigh(at[OUTPUT_GRAM][0].numpy())
    star = qg.T @ w @ qa
    cost = star**2 * np.outer(g.clip(0), a.clip(0)) / 2
    on_rows = np.argsort(-cost.sum(1))[:rows]
    on_columns = np.argsort(-cost.sum(0))[:columns]
    threshold = min(cost.sum(1)[on_rows].min(), cost.sum(0)[on_columns].min())
    assert (np.delete(cost.sum(1), on_rows) <= threshold).all()
    assert (np.delete(cost.sum(0), on_columns) <= threshold).all()
    expected = qg[:, on_rows] @ star[np.ix_(on_rows, on_columns)] @ qa[:, on_columns].T
    first, second, third = (part.weight.detach() for part in model[3])
    np.testing.assert_allclose(third @ second @ first, expected, atol=1e-9)
    torch.testing.assert_close(model[3][2].bias, dense[3].bias)


def test_the_cost_is_that_of_the_kronecker_factored_fisher_matrix():
    """In its eigenbasis F is diagonal, so removing one column costs d^T F d / 2 exactly."""
    model = net()
    at = signals_of(model).at("3.weight")
    a, g = at[GRAM][0].numpy(), at[OUTPUT_GRAM][0].numpy()
    w = model[3].weight.detach().numpy()
    values, vectors = np.linalg.eigh(a)
    change = w @ np.outer(vectors[:, -1], vectors[:, -1])
    full = change.flatten() @ np.kron(g, a) @ change.flatten() / 2
    outer, qg = np.linalg.eigh(g)
    star = qg.T @ w @ vectors
    assert full == pytest.approx((star[:, -1] ** 2 * outer * values[-1]).sum() / 2, rel=1e-9)


def test_convolutions_are_rotated_over_their_channels_and_get_smaller():
    model = net()
    before = model(data()[0][0]).detach()
    total = sum(site.size for site in find(model))
    found = eigendamage(model, 0.3, batches=data(), loss=loss)
    assert sum(r.after for r in found.values()) <= 0.7 * total
    assert sum(p.numel() for n, p in model.named_parameters() if "weight" in n) == sum(
        r.after for r in found.values()
    )
    assert model(data()[0][0]).shape == before.shape
    model(data()[0][0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_factors_of_a_convolution_project_its_kernels_onto_the_eigenbasis():
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(32, 6)).double()
    torch.manual_seed(3)
    batch = (torch.randn(30, 6, 4, 4).double(), torch.arange(30) % 6)
    w = model[0].weight.detach().numpy()
    patches = nn.functional.unfold(batch[0], 3).reshape(30, 6, 9, 4)
    a = torch.einsum("nipl,njpl->ij", patches, patches).numpy()
    out = model[0](batch[0])
    (grad,) = torch.autograd.grad(
        nn.functional.cross_entropy(model[2](out.flatten(1)), batch[1]), out
    )
    rows = grad.movedim(1, 0).flatten(1)
    found = eigendamage(model, 0.4, batches=[batch], loss=loss, include="0.weight")["0.weight"]
    assert found.rank is not None
    columns, count = found.rank
    _, qa = np.linalg.eigh(a)
    _, qg = np.linalg.eigh((rows @ rows.T).numpy())
    star = np.einsum("or,oihw,ic->rchw", qg, w, qa)
    cost = np.einsum("rchw->rc", star**2) * np.outer(
        np.linalg.eigvalsh((rows @ rows.T).numpy()).clip(0), np.linalg.eigvalsh(a).clip(0)
    )
    r, c = np.argsort(-cost.sum(1))[:count], np.argsort(-cost.sum(0))[:columns]
    expected = np.einsum("or,rchw,ic->oihw", qg[:, r], star[r][:, c], qa[:, c])
    down, middle, up = (part.weight.detach().numpy() for part in model[0])
    got = np.einsum("or,rchw,ci->oihw", up[:, :, 0, 0], middle, down[:, :, 0, 0])
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(TargetError, match="one direction left"):
        eigendamage(net(), 0.99, batches=data(), loss=loss)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(SiteError, match="without groups"):
        eigendamage(grouped, 0.1, batches=[], loss=loss)

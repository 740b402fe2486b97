"""In which mode a network runs when its signals are taken, and that its mode comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.drive import Sources, collect
from prunus.kinds import FLOW, GRADIENT, HESSIAN_GRADIENT, INPUT_MEAN, INPUT_ROWS, OUTPUT_GRAM
from prunus.sites import find, parameters


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(self.training)
        return x


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), Spy(), nn.ReLU(), nn.Linear(6, 2))


def sources(model):
    found = find(model)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    return Sources(model, found, parameters(model, found), {}, x, [x], loss)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kind", [GRADIENT, FLOW, HESSIAN_GRADIENT, INPUT_MEAN, INPUT_ROWS, OUTPUT_GRAM]
)
def test_only_the_gradient_is_taken_in_the_mode_of_the_model(kind, training):
    model = net().train(training)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    collect(frozenset({kind}), sources(model))
    assert model[2].seen
    assert set(model[2].seen) == {training if kind == GRADIENT else False}
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_in_train_mode_the_gradient_is_that_of_the_batchs_own_statistics():
    model = net()
    given = sources(model)
    got = collect(frozenset({GRADIENT}), given).tensors[GRADIENT]["0.weight"]
    (x,) = given.batches
    hidden = model[0](x)
    normed = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + model[1].eps).sqrt()
    loss = model[4](normed.relu()).square().mean()
    torch.testing.assert_close(got, torch.autograd.grad(loss, model[0].weight)[0])


def test_a_sample_of_inputs_is_all_of_them_or_a_part_that_repeats():
    model = net()
    given = sources(model)
    rows = collect(frozenset({INPUT_ROWS}), given).tensors[INPUT_ROWS]["0.weight"]
    assert torch.equal(rows[0], given.inputs)
    many = torch.randn(3000, 4, generator=torch.Generator().manual_seed(2))
    large = Sources(model, given.sites, given.parameters, {}, None, [many[:1700], many[1700:]])
    first, second = (
        collect(frozenset({INPUT_ROWS}), large).tensors[INPUT_ROWS]["0.weight"][0] for _ in range(2)
    )
    assert first.shape == (1024, 4)
    assert torch.equal(first, second)
    places = (many[None] == first[:, None]).all(2).nonzero()[:, 1]
    assert len(places.unique()) == 1024
    assert 0.45 < float((places < 1700).float().mean()) < 0.68

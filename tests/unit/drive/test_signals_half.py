"""Sums over many batches are taken in float32 or wider, whatever the network computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import kinds
from prunus.drive import Sources, collect
from prunus.drive.signals.table import COLLECTORS
from prunus.sites import find, parameters

BATCHES = 400
"""More than bfloat16 can count: 256 + 1 is 256 in it."""

SUMMED = [
    kinds.GRADIENT,
    kinds.GRADIENT_SQUARE,
    kinds.HESSIAN,
    kinds.HESSIAN_DIAGONAL,
    kinds.HESSIAN_GRADIENT,
    kinds.HUTCHINSON,
    kinds.COACTIVATION,
    kinds.INPUT_MEAN,
    kinds.INPUT_SQUARE,
    kinds.GRAM,
    kinds.OUTPUT_GRAM,
    kinds.OUTPUT_MAGNITUDE,
    kinds.OUTPUT_SENSITIVITY,
    kinds.OUTPUT_TAYLOR,
    kinds.GATE,
]


def of_one(kind, dtype, batches, loss, weight=1.0):
    """The signal of a layer of one weight."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).to(dtype)
    nn.init.constant_(model[0].weight, weight)
    sites = find(model)
    sources = Sources(model, sites, parameters(model, sites), {}, batches=batches, loss=loss)
    return collect(frozenset({kind}), sources).at("0.weight")[kind]


def half_square(model, batch):
    return model(batch).square().sum() / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", SUMMED)
def test_the_mean_over_many_batches_is_exact(kind, dtype):
    """x = w = y = 1 and L = y^2 / 2: every one of these signals is 1 in every batch."""
    found = of_one(kind, dtype, [torch.ones(1, 1, dtype=dtype)] * BATCHES, half_square)
    assert found.dtype in (torch.float32, torch.float64)
    if dtype == torch.float64:
        assert found.dtype == torch.float64
    assert found.flatten().tolist() == [1.0]


def test_every_collector_of_a_mean_is_in_the_list():
    others = {  # from one example, or no sum over batches
        kinds.FLOW, kinds.IMPORTANCE, kinds.BIAS, kinds.INPUT_ROWS, kinds.NORM_SCALE,
        kinds.GRADIENTS, kinds.OUTPUT_ZEROS, kinds.OUTPUT_VARIANCE, kinds.OUTPUT_DISTINCTNESS,
    }  # fmt: skip
    assert COLLECTORS.keys() - others == set(SUMMED)


@pytest.mark.parametrize("kind", [kinds.GATE, kinds.OUTPUT_TAYLOR])
def test_products_of_small_halves_do_not_underflow(kind):
    batch = torch.full((1, 1), 1e-4, dtype=torch.float16)
    found = of_one(kind, torch.float16, [batch], lambda m, b: (m(b) * 1e-4).sum())
    assert float(found) == pytest.approx(1e-8, rel=1e-2)


def test_gradients_of_examples_do_not_overflow_in_half():
    """A batch of 100 whose mean loss has the gradient 1000 / 100 each: 1000 squared is too much."""
    batch = torch.ones(100, 1, dtype=torch.float16)
    found = of_one(kinds.OUTPUT_GRAM, torch.float16, [batch], lambda m, b: (m(b) * 1e3).mean())
    assert float(found) == pytest.approx(1e6, rel=1e-2)

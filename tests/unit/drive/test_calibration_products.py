"""The products of calibration against float64, at every size that takes another way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.drive.signals import products


@pytest.mark.parametrize("n", [1, 7, products.PANEL, products.PANEL + 5, 2 * products.PANEL + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices_are_whole_on_both_sides_of_the_diagonal(n, dtype):
    x = torch.randn(2, 9, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    found = products.gram(x)
    wanted = x.double().transpose(1, 2) @ x.double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [3, 256])
def test_linear_layers_give_the_same_in_float32(bias, width):
    torch.manual_seed(0)
    layer = nn.Linear(width, width, bias=bias)
    x = torch.randn(2, 64, width)
    wanted = layer.double()(x.double())
    layer.float()
    with torch.no_grad(), products.FastLinear():
        found = layer(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_needs_gradients_or_is_not_float32_stays_with_torch(monkeypatch):
    def never(*args):
        raise AssertionError("not its business")

    monkeypatch.setattr(products, "product", never)
    layer, x = nn.Linear(256, 256), torch.randn(64, 256)
    with products.FastLinear():
        layer(x).sum().backward()
        with torch.no_grad():
            layer.bfloat16()(x.bfloat16())
            layer.double()(x.double())
    assert layer.weight.grad is not None


def test_large_float32_layers_do_take_the_fast_way(monkeypatch):
    if not products._worth(torch.zeros(64, 256), torch.zeros(256, 256)):
        pytest.skip("this torch has no oneDNN")
    seen = []
    real = products.product
    monkeypatch.setattr(products, "product", lambda *a: seen.append(1) or real(*a))
    with torch.no_grad(), products.FastLinear():
        nn.Linear(256, 256)(torch.randn(64, 256))
    assert seen == [1]

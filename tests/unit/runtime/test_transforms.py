"""Derivatives that torch's operators of prunus do not know, and models that cannot be copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune as torch_prune

import prunus as pr
from prunus.errors import ValueRangeError

# What torch itself does when it first loads its decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")


def compiled(kind: str) -> tuple[Any, Any, torch.Tensor]:
    """(dense, packed, input)."""
    torch.manual_seed(0)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
        x = torch.randn(5, 24)
    else:
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        x = torch.randn(2, 4, 6, 6)
    pr.prune(model, pr.methods.random_pruning(0.6))
    model.eval().requires_grad_(False)
    return model, pr.compile(model, x, choose=lambda layer: "csr"), x


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_tangents_of_forward_mode_are_those_of_torch(kind):
    model, fast, x = compiled(kind)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        found, wanted = forward_ad.unpack_dual(fast(dual)), forward_ad.unpack_dual(model(dual))
    assert wanted.tangent is not None
    torch.testing.assert_close(found.primal, wanted.primal, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.tangent, wanted.tangent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_function_transforms(kind):
    model, fast, x = compiled(kind)
    found = torch.func.vmap(fast)(x.unsqueeze(1))
    torch.testing.assert_close(found, model(x).unsqueeze(1), rtol=1e-4, atol=1e-4)
    found = torch.func.grad(lambda x: fast(x).square().sum())(x)
    wanted = torch.func.grad(lambda x: model(x).square().sum())(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_chains_and_attention_in_function_transforms():
    from prunus.runtime import SparseLinear
    from prunus.runtime.attention import attend
    from prunus.runtime.chain import SparseChain

    torch.manual_seed(0)
    one, two = nn.Linear(24, 32).requires_grad_(False), nn.Linear(32, 24).requires_grad_(False)
    chain = SparseChain([SparseLinear.from_dense(one), SparseLinear.from_dense(two)])
    x, tangent = torch.randn(5, 24), torch.randn(5, 24)
    wanted = torch.func.jvp(lambda x: two(one(x)), (x,), (tangent,))[1]
    found = torch.func.jvp(chain, (x,), (tangent,))[1]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    q = torch.randn(1, 2, 40, 16)
    plain = nn.functional.scaled_dot_product_attention
    wanted = torch.func.grad(lambda q: plain(q, q, q).square().sum())(q)
    found = torch.func.grad(lambda q: attend(q, q, q).square().sum())(q)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_copied_says_how_to_go_on():
    layer = nn.Linear(24, 8)
    torch_prune.l1_unstructured(layer, "weight", 0.9)
    model = nn.Sequential(layer).eval()
    with pytest.raises(ValueRangeError, match="remove"):
        pr.compile(model, torch.randn(2, 24))
    torch_prune.remove(layer, "weight")
    assert pr.compile(model, torch.randn(2, 24)) is not model


def test_a_layer_holds_its_weight_in_the_ways_it_switches_between_only():
    from prunus.runtime.candidates import TABLE, layer_of
    from prunus.runtime.decide import _built, row_of

    layer = nn.Linear(24, 8)
    ways = {way.name: way for way in TABLE}
    switch = ((1.0, "bitmap"), (float("inf"), "csr"))
    row = row_of(layer_of("", layer), "tiled", "", switch=switch)
    built: Any = _built(row, layer, ways)
    assert set(built.ways) == {"bitmap", "csr"}

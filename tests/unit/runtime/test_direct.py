"""Dense convolutions of few channels through the packed kernels."""

from __future__ import annotations

import torch
from torch import nn

from prunus.runtime import SparseConv2d, compile
from prunus.runtime.candidates import is_direct


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.SiLU(),
        nn.Conv2d(8, 16, 1),
    ).eval()


def test_who_is_tried():
    kinds = [is_direct(layer) for layer in network()]
    assert kinds == [True, False, False, True, False, False]
    assert is_direct(nn.Conv1d(6, 6, 3, groups=6))
    assert not is_direct(nn.Linear(3, 3))


def test_direct_layers_fold_fuse_and_compute_the_same():
    model, x = network(), torch.randn(2, 3, 33, 35)
    fast = compile(model, x, choose=lambda layer: "direct" if layer.name in "03" else "dense")
    assert [row.choice for row in fast.plan.rows] == ["direct", "direct", "dense"]
    assert [row.fused for row in fast.plan.rows] == ["batch norm, relu6", "silu", ""]
    assert isinstance(fast[0], SparseConv2d)
    assert isinstance(fast[3], SparseConv2d)
    assert fast.plan.sparse_layers == ()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_clock_may_choose_direct_only_below_the_sparsity_for_csr():
    model, x = network(), torch.randn(1, 3, 32, 32)
    plan = compile(model, x).plan
    assert {row.choice for row in plan.rows} <= {"direct", "dense"}
    assert plan.rows[2].reason == "less than 25% sparse"
    assert all("x" in row.reason and "sparse; " in row.reason for row in plan.rows[:2])

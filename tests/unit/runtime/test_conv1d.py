"""The packed 1-d convolution against torch's in float64, and through compile, save and load."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunus.errors import ShapeError
from prunus.runtime import SparseConv1d, compile, load, save


def conv(sparsity=0.7, **options):
    torch.manual_seed(len(options))
    made = nn.Conv1d(options.pop("inputs", 6), options.pop("outputs", 12), **options).eval()
    with torch.no_grad():
        made.weight *= torch.rand(made.weight.shape) >= sparsity
    return made.requires_grad_(False)


CASES = {
    "1": {"kernel_size": 1},
    "3": {"kernel_size": 3},
    "3 same": {"kernel_size": 3, "padding": "same"},
    "4 same": {"kernel_size": 4, "padding": "same", "dilation": 3},
    "5 valid": {"kernel_size": 5, "padding": "valid"},
    "5 stride 2": {"kernel_size": 5, "stride": 2, "padding": 2},
    "3 stride 3 dilation 2": {"kernel_size": 3, "stride": 3, "padding": 4, "dilation": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 3},
    "depthwise": {"kernel_size": 7, "padding": 3, "groups": 6},
    "no bias": {"kernel_size": 3, "bias": False},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "reflect": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    "replicate": {"kernel_size": 5, "padding": 4, "stride": 2, "padding_mode": "replicate"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 1.0])
def test_matches_torch_in_float64_and_goes_back(name, sparsity):
    dense = conv(sparsity, **dict(CASES[name]))
    sparse = SparseConv1d.from_dense(dense)
    wide = copy.deepcopy(dense).double()
    for batch, length in itertools.product((1, 3), (17, 64, 131)):
        x = torch.randn(batch, 6, length)
        torch.testing.assert_close(sparse(x).double(), wide(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse(x[0]), sparse(x)[0], rtol=0, atol=0)
    back = sparse.to_dense()
    assert type(back) is nn.Conv1d
    assert repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight)
    assert sparse.weight_shape == tuple(dense.weight.shape)
    assert torch.equal(sparse.weight, dense.weight)


def test_residual_activation_and_half():
    dense = conv(kernel_size=3, stride=2, padding=1)
    sparse = SparseConv1d.from_dense(dense).with_activation("relu")
    x = torch.randn(2, 6, 33)
    residual = torch.randn(2, 12, 17)
    wanted = F.relu(dense(x) + residual)
    torch.testing.assert_close(sparse(x, residual), wanted, rtol=1e-5, atol=1e-5)
    row = torch.randn(17)  # broadcasts: added outside of the kernel
    torch.testing.assert_close(sparse(x, row), F.relu(dense(x) + row), rtol=1e-5, atol=1e-5)
    assert sparse(x.bfloat16()).dtype == torch.bfloat16


def test_wrong_inputs_are_refused():
    sparse = SparseConv1d.from_dense(conv(kernel_size=3))
    for shape in ((2, 5, 9), (9,), (1, 2, 6, 9)):
        with pytest.raises(ShapeError, match="the layer takes"):
            sparse(torch.randn(shape))
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        sparse(torch.randn(1, 6, 2))


def test_gradients_reach_the_input():
    dense = conv(kernel_size=3, padding=1, stride=2)
    sparse = SparseConv1d.from_dense(dense)
    grads = []
    for layer in (dense, sparse):
        x = torch.linspace(-1, 1, 2 * 6 * 11).reshape(2, 6, 11).requires_grad_()
        layer(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def network():
    first = conv(0.8, inputs=6, outputs=24, kernel_size=5, padding="same")
    second = conv(0.8, inputs=24, outputs=12, kernel_size=3, stride=2, groups=2)
    made = nn.Sequential(first, nn.BatchNorm1d(24), nn.ReLU(), second).eval()
    made[1].running_mean.normal_()
    made[1].running_var.uniform_(0.5, 2.0)
    return made


def test_compile_folds_and_fuses_and_the_file_comes_back(tmp_path):
    model, x = network(), torch.randn(3, 6, 50)
    fast = compile(model, x, choose=lambda layer: "csr")
    assert [row.kind for row in fast.plan.rows] == ["conv1d", "conv1d"]
    assert [row.fused for row in fast.plan.rows] == ["batch norm, relu", ""]
    assert isinstance(fast[0], SparseConv1d)
    assert isinstance(fast[1], nn.Identity)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    save(fast, tmp_path / "fast.safetensors")
    other = compile(network(), x, choose=lambda layer: "csr")
    with torch.no_grad():
        other[0].bias.zero_()
    assert not torch.equal(other(x), fast(x))
    assert torch.equal(load(tmp_path / "fast.safetensors", other)(x), fast(x))
    torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x), rtol=0, atol=0)


def test_export_sees_the_operator():
    sparse = SparseConv1d.from_dense(conv(kernel_size=3, padding=1))
    x = torch.randn(2, 6, 20)
    program = torch.export.export(sparse, (x,))
    assert any("sparse_conv2d" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), sparse(x), rtol=0, atol=0)

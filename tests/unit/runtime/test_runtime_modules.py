"""SparseLinear and SparseConv2d against float64 dense layers."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.runtime import SparseConv2d, SparseLinear


def pruned(module, sparsity=0.8, seed=0):
    """The module with random weights, a fraction of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        keep = torch.rand(module.weight.shape, generator=generator) >= sparsity
        module.weight.mul_(keep)
    return module


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(module, x):
    """The dense layer in float64."""
    return copy.deepcopy(module).double()(x.double()).detach()


def assert_computes(sparse, dense, x):
    y = sparse(x)
    wanted = exact(dense, x)
    assert y.dtype == x.dtype
    assert y.shape == wanted.shape
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    leading=st.lists(st.integers(0, 5), max_size=3),
    sparsity=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_computes_the_dense_layer(rows, columns, leading, sparsity, bias, seed):
    dense = pruned(nn.Linear(columns, rows, bias=bias), sparsity, seed)
    assert_computes(SparseLinear.from_dense(dense), dense, images(*leading, columns, seed=seed))


CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": (2, 3)},
    "1x1 padded": {"kernel_size": 1, "padding": (1, 2)},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "oblong": {"kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 3)},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 1)},
    "same": {"kernel_size": (4, 2), "padding": "same"},
    "same dilated": {"kernel_size": 2, "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "long": {"kernel_size": (5, 1), "stride": 3, "padding": (4, 2)},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    "circular same": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "reflect 1x1": {"kernel_size": 1, "padding": 1, "padding_mode": "reflect"},
}


# torch itself warns that an even kernel with 'same' costs it a copy.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("through_operator", [False, True])
def test_convolution_computes_the_dense_layer(name, through_operator):
    dense = pruned(nn.Conv2d(3, 5, **CONVOLUTIONS[name]), 0.6)
    sparse = SparseConv2d.from_dense(dense)
    for shape in ((2, 3, 9, 7), (1, 3, 6, 6), (3, 8, 5)):
        x = images(*shape)
        assert_computes(sparse, dense, x.requires_grad_() if through_operator else x)


@pytest.mark.parametrize("through_operator", [False, True])
@pytest.mark.parametrize("groups", [2, 6])
def test_a_grouped_convolution_computes_the_dense_layer(groups, through_operator):
    for options in ({}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}):
        dense = pruned(nn.Conv2d(6, 12, 3, groups=groups, **options), 0.5)
        x = images(2, 6, 9, 8)
        sparse = SparseConv2d.from_dense(dense)
        assert_computes(sparse, dense, x.requires_grad_() if through_operator else x)
        assert repr(sparse.to_dense()) == repr(dense)
        assert torch.equal(sparse.to_dense().weight, dense.weight)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu", "relu6"])
def test_a_fused_activation_is_applied_to_the_output(name):
    functions = {"relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(), "relu6": nn.ReLU6()}
    function = functions.get(name, nn.GELU(approximate="tanh"))
    for dense, x in (
        (pruned(nn.Linear(20, 30)), images(3, 20)),
        (pruned(nn.Conv2d(4, 6, 3)), images(2, 4, 7, 8)),
    ):
        pack = SparseConv2d if x.dim() == 4 else SparseLinear
        sparse = pack.from_dense(dense)
        fused = sparse.with_activation(name)
        assert sparse.activation == ""
        assert f"activation='{name}'" in repr(fused)
        torch.testing.assert_close(fused(x), function(dense(x)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused(x.requires_grad_()), fused(x.detach()))
        assert copy.deepcopy(fused).activation == name
        assert pickle.loads(pickle.dumps(fused)).activation == name
    with pytest.raises(ValueRangeError, match="'tanh'"):
        fused.with_activation("tanh")


def test_a_convolution_takes_channels_last_and_other_strides():
    dense = pruned(nn.Conv2d(4, 6, 3))
    sparse = SparseConv2d.from_dense(dense)
    x = images(2, 4, 8, 8)
    wanted = sparse(x)
    assert torch.equal(sparse(x.to(memory_format=torch.channels_last)), wanted)
    assert torch.equal(
        sparse(images(2, 8, 8, 4).copy_(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), wanted
    )
    one = SparseConv2d.from_dense(pruned(nn.Conv2d(4, 6, 1)))
    assert torch.equal(one(x.to(memory_format=torch.channels_last)), one(x))


def test_a_linear_layer_takes_any_strides():
    dense = pruned(nn.Linear(6, 5))
    sparse = SparseLinear.from_dense(dense)
    x = images(6, 4)
    assert torch.equal(sparse(x.T), sparse(x.T.contiguous()))
    assert torch.equal(sparse(x[:, :1].T.expand(3, 6)), sparse(x[:, :1].T.repeat(3, 1)))


def test_empty_batches_keep_their_shape():
    assert SparseLinear.from_dense(pruned(nn.Linear(6, 5)))(torch.zeros(0, 6)).shape == (0, 5)
    assert SparseLinear.from_dense(pruned(nn.Linear(6, 5)))(torch.zeros(2, 0, 6)).shape == (2, 0, 5)
    for size in (1, 3):
        convolution = SparseConv2d.from_dense(pruned(nn.Conv2d(3, 4, size)))
        assert convolution(torch.zeros(0, 3, 5, 5)).shape == (0, 4, 6 - size, 6 - size)


def test_nan_and_infinity_reach_only_outputs_that_keep_a_weight_on_them():
    dense = nn.Linear(3, 2, bias=False)
    dense.weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    y = SparseLinear.from_dense(dense)(torch.tensor([[float("nan"), 1.0, float("inf")]]))
    assert y[0, 0].isnan()
    assert y[0, 1] == 3.0


def test_results_do_not_depend_on_the_number_of_threads():
    linear = SparseLinear.from_dense(pruned(nn.Linear(130, 70)))
    convolution = SparseConv2d.from_dense(pruned(nn.Conv2d(8, 16, 3)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append((linear(images(33, 130)), convolution(images(2, 8, 20, 20))))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_fp32_and_cast_back(dtype):
    dense = pruned(nn.Linear(40, 20))
    sparse, x = SparseLinear.from_dense(dense), images(3, 40).to(dtype)
    assert torch.equal(sparse(x), sparse(x.float()).to(dtype))
    convolution = SparseConv2d.from_dense(pruned(nn.Conv2d(2, 3, 3)))
    x = images(1, 2, 6, 6).to(dtype)
    assert torch.equal(convolution(x), convolution(x.float()).to(dtype))


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_converting_the_module_leaves_the_packed_weight_alone(convert):
    sparse = SparseLinear.from_dense(pruned(nn.Linear(40, 20, bias=False)))
    x = images(3, 40)
    wanted = sparse(x)
    assert torch.equal(getattr(sparse, convert)()(x), wanted)


def test_what_cannot_be_computed_is_refused():
    sparse = SparseLinear.from_dense(pruned(nn.Linear(6, 5)))
    convolution = SparseConv2d.from_dense(pruned(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ShapeError, match=r"\[2, 7\].*\[\.\.\., 6\]"):
        sparse(torch.zeros(2, 7))
    with pytest.raises(ShapeError, match="6"):
        sparse(torch.tensor(1.0))
    with pytest.raises(ShapeError, match="batch, 3, height"):
        convolution(torch.zeros(2, 4, 5, 5))
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        convolution(torch.zeros(1, 3, 2, 9))
    with pytest.raises(ValueRangeError, match=r"float64.*to_dense"):
        sparse(torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(ValueRangeError, match=r"meta.*CPU"):
        sparse(torch.zeros(2, 6, device="meta"))
    with pytest.raises(ShapeError, match="4 output channels do not divide into 3 groups"):
        SparseConv2d(convolution.packed, kernel_size=3, groups=3)
    with pytest.raises(FormatError, match=r"use \.half"):
        copy.deepcopy(sparse).type(torch.float16)(torch.zeros(2, 6))
    with pytest.raises(ShapeError, match="do not divide"):
        SparseConv2d(sparse.packed, kernel_size=5)
    with pytest.raises(ShapeError, match="bias"):
        SparseLinear(sparse.packed, torch.zeros(3))


def test_to_dense_gives_back_every_weight():
    linear = pruned(nn.Linear(6, 5))
    again = SparseLinear.from_dense(linear).to_dense()
    assert type(again) is nn.Linear
    assert torch.equal(again.weight, linear.weight)
    assert torch.equal(again.bias, linear.bias)
    dense = pruned(nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=2, bias=False))
    sparse = SparseConv2d.from_dense(dense)
    back = sparse.to_dense()
    assert type(back) is nn.Conv2d
    assert repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(sparse.weight, dense.weight)


def test_counts_and_repr_tell_the_dense_shape():
    dense = pruned(nn.Conv2d(3, 4, 3))
    dense.bias.data[0] = 0
    sparse = SparseConv2d.from_dense(dense)
    kept = int(dense.weight.count_nonzero())
    assert sparse.sparse_counts() == {"weight": ((4, 3, 3, 3), kept), "bias": ((4,), 3)}
    assert sparse.sparsity == pytest.approx(1 - kept / 108)
    assert f"sparsity={1 - kept / 108:.4f}" in repr(sparse)
    assert "in_features=6, out_features=5" in repr(SparseLinear.from_dense(nn.Linear(6, 5)))


def test_copies_and_pickles_compute_the_same_and_share_nothing():
    sparse = SparseLinear.from_dense(pruned(nn.Linear(6, 5)))
    x = images(3, 6)
    wanted = sparse(x)
    twins = [copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))]
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    sparse.packed.zero_()
    for twin in twins:
        assert torch.equal(twin(x), wanted)


def test_share_memory_keeps_computing():
    sparse = SparseLinear.from_dense(pruned(nn.Linear(6, 5)))
    x = images(3, 6)
    wanted = sparse(x)
    assert torch.equal(sparse.share_memory()(x), wanted)
    assert sparse.packed.is_shared()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_another_sparsity_loads(assign):
    source = SparseLinear.from_dense(pruned(nn.Linear(30, 20), 0.5, seed=3))
    target = SparseLinear.from_dense(pruned(nn.Linear(30, 20), 0.9, seed=4))
    assert source.packed.shape != target.packed.shape
    target.load_state_dict(source.state_dict(), assign=assign)
    x = images(2, 30)
    assert torch.equal(target(x), source(x))


def test_a_misaligned_blob_is_copied_into_place():
    source = SparseLinear.from_dense(pruned(nn.Linear(30, 20)))
    room = torch.zeros(len(source.packed) + 1, dtype=torch.uint8)
    room[1:] = source.packed
    moved = SparseLinear(room[1:], source.bias)
    assert moved.packed.data_ptr() % 64 == 0
    assert torch.equal(moved(images(2, 30)), source(images(2, 30)))


def hostile_blobs():
    """Blobs that would make a kernel read outside its memory."""
    good = SparseLinear.from_dense(pruned(nn.Linear(30, 20))).packed.numpy()
    head = kernels.info(good)
    spots = {"truncated": good[:-64], "empty": good[:0], "magic": good.copy(), "noise": good.copy()}
    spots["magic"][0] ^= 1
    spots["noise"][64 + 4 :] = 255
    columns = good.copy()
    start = 64 + (4 * (head.rows * head.blocks + 1) + 63) // 64 * 64
    columns[start : start + 2] = 255
    spots["column"] = columns
    return spots


@pytest.mark.parametrize("name", list(hostile_blobs()))
def test_hostile_blobs_are_refused_wherever_they_come_in(name):
    blob = torch.from_numpy(np.ascontiguousarray(hostile_blobs()[name]))
    layer = SparseLinear.from_dense(pruned(nn.Linear(30, 20)))
    before = layer.packed.clone()
    with pytest.raises(FormatError):
        SparseLinear(blob)
    with pytest.raises(FormatError, match="packed"):
        layer.load_state_dict({"packed": blob, "bias": layer.bias})
    with pytest.raises(FormatError, match=r"0\.packed"):
        nn.Sequential(layer).load_state_dict({"0.packed": blob, "0.bias": layer.bias})
    assert torch.equal(layer.packed, before)
    broken = copy.deepcopy(layer)
    broken.packed = blob
    with pytest.raises(FormatError):
        pickle.loads(pickle.dumps(broken))


def test_a_blob_of_another_shape_is_refused():
    layer = SparseLinear.from_dense(pruned(nn.Linear(30, 20)))
    other = SparseLinear.from_dense(pruned(nn.Linear(20, 30)))
    with pytest.raises(ShapeError, match=r"30x20.*20x30"):
        layer.load_state_dict({"packed": other.packed, "bias": layer.bias})

"""Convolutions of packed layers: groups, strides and dilation, every instruction set, all paths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prunus import kernels
from prunus.training import LargestGradients, TrainableConv2d
from prunus.training.pattern import Pattern
from prunus.training.products import NATIVE

# (in, out, kernel, stride, padding, dilation, groups, (height, width), batch)
CASES = [
    (8, 12, (3, 3), (1, 1), (1, 1), (1, 1), 1, (9, 11), 3),
    (8, 12, (3, 3), (1, 1), (1, 1), (1, 1), 2, (9, 11), 3),
    (6, 9, (3, 2), (2, 1), (0, 1), (1, 1), 3, (8, 7), 2),
    (4, 6, (3, 3), (2, 2), (2, 2), (2, 2), 2, (13, 12), 2),
    (32, 40, (1, 1), (1, 1), (0, 0), (1, 1), 1, (14, 14), 4),
    (16, 48, (5, 5), (1, 1), (2, 2), (1, 1), 4, (20, 20), 3),
    (40, 24, (3, 3), (3, 3), (1, 1), (1, 1), 1, (30, 30), 2),
    (300, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 6), 2),  # several chunks of columns
]


def pair(case, sparsity=0.7):
    inputs, outputs, kernel, stride, padding, dilation, groups, size, batch = case
    torch.manual_seed(0)
    dense = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups)
    mask = torch.rand(dense.weight.shape) > sparsity
    dense.weight.data.mul_(mask)
    x = torch.randn(batch, inputs, *size)
    return dense, TrainableConv2d.from_dense(dense, mask), mask, x


def step(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], g)]


@pytest.mark.parametrize("isa", kernels.available_isas())
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sparsity", [0.2, 0.9])
def test_products_are_those_of_the_dense_layer(case, sparsity, isa):
    dense, packed, mask, x = pair(case, sparsity)
    expected = step(copy.deepcopy(dense).double(), x.double())
    expected[2] = expected[2][mask]
    before = kernels.active_isa()
    if NATIVE is not None:
        NATIVE.set_active_isa(isa)
    try:
        found = step(packed, x)
    finally:
        if NATIVE is not None:
            NATIVE.set_active_isa(before)
    for left, right in zip(found, expected, strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("case", CASES[1:4])
def test_the_reference_path_passes_gradcheck(case):
    _, packed, _, x = pair(case)
    packed.double()
    x = x[:1].double().requires_grad_()

    def call(x, values, bias):
        parameters = {"values": values, "bias": bias}
        return torch.func.functional_call(packed, parameters, (x,))

    given = (x, packed.values, packed.bias)
    assert torch.autograd.gradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_gradient(threads):
    _, packed, _, x = pair((16, 64, (3, 3), (1, 1), (1, 1), (1, 1), 2, (28, 28), 4))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = step(packed, x)
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(step(packed, x), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_rows_a_watch_sees_are_the_dense_gradient_of_each_group():
    dense, packed, _, x = pair(CASES[1])
    rows = []

    def watch(read):
        rows.append(torch.cat([read(0, 4), read(4, 9), read(9, 12)]))  # across the groups

    packed.watch = watch
    expected, found = step(dense, x), step(packed, x)
    torch.testing.assert_close(rows[0].reshape(dense.weight.shape), expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    packed.watch = best = LargestGradients(packed.pattern, 5)
    step(packed, x)
    assert len(best.places) == 5


def test_dense_and_back_keeps_groups():
    dense, packed, _, x = pair(CASES[1])
    back = packed.to_dense()
    assert back.groups == 2
    torch.testing.assert_close(back(x), dense(x))


def test_the_transposed_index_holds_two_bytes_a_weight():
    _, packed, _, x = pair(CASES[0])
    alone = packed.pattern.nbytes
    step(packed, x)
    if NATIVE is not None:
        assert packed.pattern.nbytes - alone == 2 * packed.nonzeros + 4 * (8 + 1)
    parts = packed.pattern.parts(3)
    assert [p.shape for p, _, _ in parts] == [(4, 72)] * 3
    places = torch.cat([p.places() + i * 4 * 72 for i, (p, _, _) in enumerate(parts)])
    assert torch.equal(places, packed.pattern.places())
    assert isinstance(parts[0][0], Pattern)

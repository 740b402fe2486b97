"""Convolutions of any stride, padding and dilation on packed weights, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from prunus.errors import ValueRangeError
from prunus.training import TrainableConv2d, functions
from prunus.training.pattern import Pattern
from prunus.training.products import NATIVE
from prunus.training.turns import Turn, turn_of
from prunus.training.window import Window

pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
small = st.tuples(st.integers(0, 4), st.integers(0, 4))


def compare(conv: nn.Conv2d, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients equal the dense layer's in float64; nothing is unfolded."""
    with torch.no_grad():
        conv.weight *= torch.rand(conv.weight.shape) < 0.4
    packed = TrainableConv2d.from_dense(conv)
    dense, wide = conv.double(), x.double().requires_grad_()
    wanted = dense(wide)
    g = torch.randn(wanted.shape)
    right = torch.autograd.grad(wanted, [wide, dense.weight], g.double())
    x = x.clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(functions, "seen", None)
        patch.setattr(functions, "unseen", None)
        y = packed(x)
        left = torch.autograd.grad(y, [x, packed.values], g)
    held = packed.mask()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left[0].double(), right[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left[1].double(), right[1][held], rtol=1e-4, atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(pair, pair, small, pair, st.sampled_from([1, 2, 3]), st.integers(0, 1 << 30))
def test_any_window(kernel, stride, padding, dilation, groups, seed):
    torch.manual_seed(seed)
    height, width = (int(n) for n in torch.randint(1, 19, (2,)))
    spans = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    assume(height >= spans[0] and width >= spans[1])
    conv = nn.Conv2d(4 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias=False)
    with pytest.MonkeyPatch.context() as patch:
        compare(conv, torch.randn(3, 4 * groups, height, width), patch)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (7, 2, 3), (1, 2, 0)])
@pytest.mark.parametrize("threads", [1, 2])
def test_several_pieces_of_a_batch(kernel, stride, padding, threads, monkeypatch):
    monkeypatch.setattr("prunus.training.convolution._PHASES", 4000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 8, kernel, stride, padding, bias=False)
    compare(conv, torch.randn(7, 5, 20, 21), monkeypatch)
    torch.set_num_threads(before)


def test_every_element_has_its_phase():
    turn = turn_of(Window((3, 3), (2, 2), (1, 1), (1, 1)))
    assert turn.phases == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert (turn.kernel, turn.dilation, turn.before) == ((2, 2), (1, 1), (0, 0))
    assert [phase for phase, _ in turn.spots] == [3, 2, 3, 1, 0, 1, 3, 2, 3]
    assert turn_of(Window((1, 1), (2, 2), (0, 0), (1, 1))).phases == ((0, 0),)


def test_bytes_of_a_strided_layer_are_those_of_the_values_and_two_columns():
    conv = nn.Conv2d(8, 16, 3, 2, 1)
    packed = TrainableConv2d.from_dense(conv, torch.rand(conv.weight.shape) < 0.4)
    packed(torch.randn(2, 8, 9, 9, requires_grad=True)).sum().backward()
    rows = 4 * (16 + 1) + 4 * (4 * 8 + 1)
    assert packed.pattern.nbytes == 2 * 2 * packed.nonzeros + rows


@pytest.mark.parametrize(
    "spots", [[(0, 0), (0, 1)], [(1, 1), (1, 0)], [(0, 2), (0, 1)], [(0, -1), (1, 0)]]
)
def test_the_kernel_refuses_wrong_places(spots):
    if NATIVE is None:
        pytest.skip("no compiled module")
    pattern, values = Pattern.of((2, 4), torch.arange(8)), torch.ones(8)
    turn = Turn(1, ((0, 0),), (1, 2), (1, 1), (0, 0), tuple(spots))
    with pytest.raises(ValueRangeError, match="places"):
        pattern.turned_address(NATIVE, values, torch.empty(8), turn)

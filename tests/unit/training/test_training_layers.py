"""Packed layers against torch's own, in float64 through the reference path and natively."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunus import kernels
from prunus.errors import FormatError, ShapeError
from prunus.training import Pattern, TrainableConv2d, TrainableLinear
from prunus.training import products as products_

CONVS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 2, "padding": "valid"},
]


def thin(module, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weight.mul_(torch.rand(module.weight.shape, generator=generator) > sparsity)
    return module


def dense_of(pattern):
    flat = torch.zeros(pattern.shape[0] * pattern.shape[1], dtype=torch.bool)
    flat[pattern.places()] = True
    return flat.view(pattern.shape)


def both(dense, packed, x):
    """Outputs and gradients of a dense layer with zeros and of its packed twin."""
    torch.manual_seed(1)
    g = torch.randn_like(dense(x)).detach()
    found = []
    for module in (dense, packed):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(g)
        found.append((y.detach(), leaf.grad, module.bias.grad))
    grad = dense.weight.grad.reshape(-1)[packed.pattern.places()]
    return [*zip(*found, strict=True), (grad, packed.values.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 33, 130])
@pytest.mark.parametrize(
    ("shape", "sparsity"), [((17, 33), 0.8), ((70, 50), 0.0), ((5, 1600), 0.95), ((3, 4), 1.0)]
)
def test_linear_is_the_dense_layer_with_zeros(shape, sparsity, tokens, native, dtype):
    dense = thin(nn.Linear(shape[1], shape[0]), sparsity).to(dtype)
    packed = TrainableLinear.from_dense(dense)
    packed.native = native
    assert packed.nonzeros == int((dense.weight != 0).sum())
    x = torch.randn(tokens, shape[1], dtype=dtype)
    for expected, found in both(dense, packed, x):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", CONVS)
def test_convolution_is_the_dense_layer_with_zeros(options, dtype):
    dense = thin(nn.Conv2d(5, 7, **options), 0.7).to(dtype)
    packed = TrainableConv2d.from_dense(dense)
    x = torch.randn(3, 5, 9, 8, dtype=dtype)
    for expected, found in both(dense, packed, x):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(packed(x[0]), dense(x[0]), rtol=1e-4, atol=2e-5)


def test_large_images_of_a_pointwise_convolution_one_by_one():
    dense = thin(nn.Conv2d(4, 6, 1), 0.5)
    packed, x = TrainableConv2d.from_dense(dense), torch.randn(2, 4, 24, 23)
    for expected, found in both(dense, packed, x):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_in_parts_is_the_same(monkeypatch):
    import prunus.training.functions as functions

    dense = thin(nn.Conv2d(4, 6, 3, padding=1), 0.8)
    packed, x = TrainableConv2d.from_dense(dense), torch.randn(5, 4, 6, 6)
    whole = functions.images
    monkeypatch.setattr(functions, "images", lambda *given: whole(*given, most=4 * 9 * 36 * 2))
    for expected, found in both(dense, packed, x):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_gradcheck_in_float64():
    linear = TrainableLinear.from_dense(thin(nn.Linear(6, 5), 0.5)).double()
    conv = TrainableConv2d.from_dense(thin(nn.Conv2d(2, 3, 3, stride=2, padding=1), 0.5)).double()
    cases = [(linear, torch.randn(4, 6)), (conv, torch.randn(2, 2, 5, 5))]
    for layer, x in cases:

        def run(x, values, bias, layer=layer):
            state = {"values": values, "bias": bias}
            return torch.func.functional_call(layer, state, (x,))

        given = (x.double(), layer.values.detach(), layer.bias.detach())
        given = tuple(t.clone().requires_grad_() for t in given)
        assert torch.autograd.gradcheck(run, given)


def test_other_values_through_functional_call_leave_the_parameter_alone():
    layer = TrainableLinear.from_dense(thin(nn.Linear(20, 10), 0.5))
    before, x = layer.values.detach().clone(), torch.randn(3, 20)
    y = torch.func.functional_call(layer, {"values": 2 * layer.values.detach()}, (x,))
    torch.testing.assert_close(y - layer.bias, 2 * (layer(x) - layer.bias))
    assert torch.equal(layer.values, before)


def test_batches_of_any_shape_half_inputs_and_wrong_widths():
    dense = thin(nn.Linear(12, 5), 0.6)
    packed = TrainableLinear.from_dense(dense)
    for shape in [(12,), (2, 3, 12), (0, 12)]:
        x = torch.randn(shape)
        torch.testing.assert_close(packed(x), dense(x))
    half = torch.randn(4, 12).bfloat16()
    assert packed(half).dtype == torch.bfloat16
    torch.testing.assert_close(packed(half), dense(half.float()).bfloat16())
    with pytest.raises(ShapeError, match=r"\.\.\., 12"):
        packed(torch.randn(3, 11))


def test_gradient_accumulates_over_backward_passes():
    layer = TrainableLinear.from_dense(thin(nn.Linear(30, 20), 0.8))
    x = torch.randn(7, 30)
    layer(x).sum().backward()
    once = layer.values.grad.clone()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.values.grad, 2 * once)


def test_a_changed_weight_between_forward_and_backward_is_refused():
    layer = TrainableLinear.from_dense(thin(nn.Linear(8, 8), 0.5))
    y = layer(torch.randn(2, 8)).sum()
    with torch.no_grad():
        layer.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_moments_have_the_size_of_the_non_zeros():
    layer = TrainableLinear.random(200, 100, 0.95)
    assert layer.values.numel() == round(0.05 * 20_000)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 200)).sum().backward()
    optimizer.step()
    sizes = {v.numel() for v in optimizer.state[layer.values].values() if v.dim()}
    assert sizes == {1000}


def test_state_dict_takes_the_topology_along():
    first, second = (TrainableLinear.random(40, 30, s, seed=i) for i, s in enumerate((0.9, 0.5)))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(second.dense_weight(), first.dense_weight())
    assert second.values.numel() == first.values.numel()
    x = torch.randn(5, 40)
    assert torch.equal(first(x), second(x))
    second(x).sum().backward()
    assert second.values.grad.shape == first.values.shape


def test_a_wrong_state_changes_nothing():
    layer = TrainableLinear.random(40, 30, 0.9)
    before = layer.dense_weight()
    for name, change in [
        ("columns", lambda t: t.flip(0)),
        ("offsets", lambda t: t + 1),
        ("values", lambda t: t[:-1]),
    ]:
        state = dict(layer.state_dict())
        state[name] = change(state[name])
        with pytest.raises(RuntimeError, match="values"):
            layer.load_state_dict(state)
        assert torch.equal(layer.dense_weight(), before)
    state = dict(layer.state_dict())
    del state["offsets"]
    with pytest.raises(RuntimeError, match="offsets"):
        layer.load_state_dict(state)
    extra = {**layer.state_dict(), "more": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="more"):
        layer.load_state_dict(extra)


def test_copies_and_pickles_compute_the_same():
    layer = TrainableLinear.random(40, 30, 0.9)
    x, buffer = torch.randn(5, 40), io.BytesIO()
    expected = layer(x)
    twin = copy.deepcopy(layer)
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.values.zero_()
    assert torch.equal(layer(x), expected)


def test_dense_and_back_is_exact():
    dense = thin(nn.Linear(21, 13), 0.7)
    packed = TrainableLinear.from_dense(dense)
    assert torch.equal(packed.to_dense().weight, dense.weight)
    assert torch.equal(packed.dense_weight(), dense.weight)
    assert torch.equal(packed.mask(), dense.weight != 0)
    conv = thin(nn.Conv2d(3, 4, 3, stride=2), 0.7)
    assert torch.equal(TrainableConv2d.from_dense(conv).to_dense().weight, conv.weight)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(TrainableConv2d.from_dense(conv).to_dense()(x), conv(x))


def test_random_places_are_distinct_exact_and_seeded():
    for sparsity in (0.99, 0.5, 0.2, 0.0, 1.0):
        layer = TrainableLinear.random(37, 29, sparsity, seed=4)
        places = layer.pattern.places()
        assert len(places) == round((1 - sparsity) * 37 * 29)
        assert torch.equal(places, places.unique())
        assert torch.equal(
            places, TrainableLinear.random(37, 29, sparsity, seed=4).pattern.places()
        )
    other = TrainableLinear.random(37, 29, 0.5, seed=5).pattern.places()
    assert not torch.equal(other, TrainableLinear.random(37, 29, 0.5, seed=4).pattern.places())


def test_pattern_refuses_what_is_no_index():
    good = Pattern.of((3, 4), torch.tensor([1, 2, 6, 11]))
    assert torch.equal(good.places(), torch.tensor([1, 2, 6, 11]))
    assert torch.equal(dense_of(good).nonzero()[:, 0], good.rows())
    with pytest.raises(ShapeError, match="65536"):
        Pattern.of((2, 70_000), torch.tensor([1]))
    with pytest.raises(FormatError, match="exceeds the 4 columns"):
        Pattern((3, 4), good.offsets, good.columns + 3)
    with pytest.raises(FormatError, match="sorted and unique"):
        Pattern((3, 4), good.offsets, torch.tensor([2, 2, 2, 3], dtype=torch.int16))
    wide = Pattern.of((2, 65536), torch.tensor([0, 40_000, 65_535, 65_536]))
    assert wide.wide_columns().tolist() == [0, 40_000, 65_535, 0]


@pytest.mark.skipif(kernels.active_isa() == kernels.FALLBACK, reason="no native kernels here")
@pytest.mark.parametrize("isa", [i for i in kernels.available_isas() if i != kernels.FALLBACK])
@pytest.mark.parametrize("planes", [False, True])
def test_sampled_product_of_every_instruction_set(isa, planes):
    native, index = products_.NATIVE, kernels.available_isas().index(isa)
    grain, rng = native.grain(), np.random.default_rng(3)
    native.set_grain(1)
    try:
        for m, k, n in [(1, 1, 1), (7, 5, 3), (65, 40, 31), (33, 130, 129), (18, 1601, 70)]:
            pattern = Pattern.of((m, k), torch.from_numpy(np.flatnonzero(rng.random(m * k) < 0.3)))
            x = rng.standard_normal((k, n) if planes else (n, k)).astype(np.float32)
            g = rng.standard_normal((m, n) if planes else (n, m)).astype(np.float32)
            dense = g.astype("f8") @ x.T if planes else g.T.astype("f8") @ x
            size = np.abs(g) @ np.abs(x).T if planes else np.abs(g).T @ np.abs(x)
            wanted, bound = (t.reshape(-1)[pattern.places().numpy()] for t in (dense, size))
            results = []
            for threads in (1, 2, 3):
                out = torch.full((pattern.nnz,), 7.0)
                for accumulate in (False, True):
                    native.sddmm_ptr(
                        pattern.address(out), x.ctypes.data, g.ctypes.data, out.data_ptr(), n,
                        not planes, accumulate, threads, x.shape[1], g.shape[1], index,
                    )  # fmt: skip
                results.append(out.numpy())
            assert all(np.array_equal(results[0], r) for r in results[1:])
            assert np.all(np.abs(results[0] / 2 - wanted) <= (n + 2) * 1.2e-7 * bound)
    finally:
        native.set_grain(grain)


@pytest.mark.skipif(kernels.active_isa() == kernels.FALLBACK, reason="no native kernels here")
def test_sampled_product_refuses_bad_arguments():
    from prunus.errors import ValueRangeError

    pattern, out = Pattern.of((4, 4), torch.tensor([3])), torch.zeros(1)
    x = torch.zeros(2, 4)
    good = [
        pattern.address(out),
        x.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        2,
        True,
        False,
        1,
        4,
        4,
    ]
    products_.NATIVE.sddmm_ptr(*good)
    for place, bad in [(4, -1), (7, 0), (8, 3), (9, 3), (1, 0), (3, 2)]:
        with pytest.raises(ValueRangeError):
            products_.NATIVE.sddmm_ptr(*[bad if i == place else v for i, v in enumerate(good)])


def test_amp_and_clipping_in_a_loop():
    torch.manual_seed(0)
    model = nn.Sequential(TrainableLinear.random(20, 40, 0.8), nn.ReLU(), nn.Linear(40, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    x, y, losses = torch.randn(64, 20), torch.randint(0, 3, (64,)), []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]

"""Activation and residual of every kernel on every instruction set, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError

ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]
OTHERS = ("attention", "nm", "norm", "one token", "vectors")  # with tests of their own
KERNELS = [r["layout"] for r in kernels.table() if not r["layout"].startswith(OTHERS)]
FUNCTIONS = {
    "": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
}


def call(layout, weight, x_kn, residual=None, **options):
    """Y [M, N] from X [K, N] through a kernel of this layout; residual [M, N]."""
    blob = kernels.pack(weight, kind="tiled_f32" if layout.startswith("tiled") else "csr_f32")
    if layout in ("planes", "tiled_planes"):
        return kernels.matmul_planes(blob, x_kn, residual=residual, **options)
    if layout == "conv":
        geometry = kernels.Geometry(1, len(x_kn), (1, x_kn.shape[1]), (1, 1))
        added = None if residual is None else residual[None, :, None]
        y = kernels.conv2d(blob, x_kn[None, :, None], geometry, residual=added, **options)
        return y[0, :, 0]
    added = None if residual is None else np.ascontiguousarray(residual.T)
    return kernels.linear(blob, np.ascontiguousarray(x_kn.T), residual=added, **options).T


def identity(values):
    """(weight, x) whose product is the values: each is one row of one column."""
    return np.asarray(values, np.float32).reshape(-1, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", KERNELS)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_match_float64(activation, layout, isa):
    far = [-1e30, -1e4, -90, -87, -40, 0, 1e-30, -1e-30, 40, 90, 1e4, 1e30]
    values = np.concatenate([np.linspace(-12, 12, 4001), far]).astype(np.float32)
    x = np.ones((1, 1 if layout == "vector" else 3), np.float32)
    y = call(layout, identity(values), x, activation=activation, isa=isa)
    exact = FUNCTIONS[activation](torch.from_numpy(values).double()).numpy()[:, None]
    exact = np.where(np.isnan(exact), 0.0, exact)  # torch: minus infinity times zero
    assert np.all(np.abs(y - exact) <= 5e-7 * np.minimum(np.abs(values), 1e30)[:, None])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations_of_nan_and_infinity(activation, isa):
    weight = identity([math.nan, math.inf, -math.inf])
    y = call("tokens", weight, np.ones((1, 2), np.float32), activation=activation, isa=isa)[:, 0]
    assert np.isnan(y[0])
    assert y[1] == (6 if activation == "relu6" else np.inf)
    assert y[2] == -np.inf if activation == "" else abs(y[2]) < 1e-30


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", KERNELS)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_residual_is_added_before_the_activation(activation, layout, isa):
    rng = np.random.default_rng(2)
    for m, n in ((1, 2), (17, 33), (70, 65), (16, 64)):
        n = 1 if layout == "vector" else n
        weight = rng.standard_normal((m, 20)).astype(np.float32)
        weight[rng.random(weight.shape) < 0.5] = 0
        x = rng.standard_normal((20, n)).astype(np.float32)
        bias, residual = rng.standard_normal(m), rng.standard_normal((m, n))
        y = call(
            layout, weight, x, residual.astype(np.float32), bias=bias.astype(np.float32),
            activation=activation, threads=2, isa=isa,
        )  # fmt: skip
        total = weight.astype(np.float64) @ x + bias[:, None] + residual
        exact = FUNCTIONS[activation](torch.from_numpy(total)).numpy()
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


def test_unknown_activations_flags_and_residuals_are_refused():
    weight, x = identity([1.0, 2.0]), np.ones((3, 1), np.float32)
    blob, y = kernels.pack(weight), np.zeros((3, 2), np.float32)
    with pytest.raises(ValueRangeError, match="activation"):
        kernels.linear(blob, x, activation="tanh")
    for flags in (3, 32, 6):
        with pytest.raises(ValueRangeError, match="unknown flags"):
            kernels.linear_ptr(blob.ctypes.data, x.ctypes.data, y.ctypes.data, 3, 0, flags)
        with pytest.raises(ValueRangeError, match="unknown flags"):
            kernels.addresses.linear_ptr(
                blob.ctypes.data, x.ctypes.data, y.ctypes.data, 3, 0, flags
            )
    with pytest.raises(ShapeError, match="residual"):
        kernels.linear(blob, x, residual=np.zeros((2, 3), np.float32))
    with pytest.raises(ShapeError, match="residual"):
        kernels.matmul_planes(blob, x.T, residual=np.zeros((2, 3)))

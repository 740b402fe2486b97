"""Depthwise and full-weight convolutions on every instruction set, against a float64 sum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_conv_contract import ISAS, assert_close, draw, exact, pack

from prunus import kernels
from prunus.kernels import Geometry

SIDES = (1, 3, 7, 8, 9, 14, 15, 16, 17, 31, 33)


@pytest.fixture(autouse=True)
def _split_small_work():
    native = pytest.importorskip("prunus._native")
    grain = native.grain()
    native.set_grain(1)
    yield
    native.set_grain(grain)


def compare(geometry, rows, isa, sparsity=0.0, threads=1):
    rng = np.random.default_rng(rows)
    weight, x = draw(rng, geometry, rows, sparsity)
    bias = rng.standard_normal(rows).astype(np.float32)
    residual = rng.standard_normal((geometry.batch, rows, *geometry.out_size)).astype(np.float32)
    y = kernels.conv2d(
        pack(weight), x, geometry, bias, "relu6", threads=threads, residual=residual, isa=isa
    )
    wanted, scale = exact(weight, x, geometry)
    for added in (bias[:, None, None].astype(np.float64), residual.astype(np.float64)):
        wanted, scale = wanted + added, scale + np.abs(added)
    assert_close(y, np.clip(wanted, 0, 6), scale, weight[0].size + 3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kernel", "stride"), [*itertools.product((3, 5, 7), (1, 2))])
def test_depthwise_of_every_width(kernel, stride, isa):
    for i, side in enumerate(SIDES):
        half = kernel // 2
        geometry = Geometry(
            1 + i % 2, 3, (SIDES[-1 - i], side), (kernel, kernel), (stride, stride),
            padding=(half, half, half, half), groups=3,
        )  # fmt: skip
        compare(geometry, 3 * (1 + i % 2), isa, threads=1 + i % 3)


@pytest.mark.parametrize("isa", ISAS)
def test_depthwise_with_more_padding_than_a_vector_and_pruned_weights(isa):
    wide = Geometry(2, 4, (9, 11), (3, 3), padding=(5, 9, 21, 37), groups=4)
    for sparsity in (0.0, 0.5, 1.0):
        compare(wide, 4, isa, sparsity, threads=2)


@pytest.mark.parametrize("isa", ISAS)
def test_full_weights(isa):
    for rows, channels, side in itertools.product((1, 4, 7, 13), (1, 3, 8), (7, 17, 33)):
        compare(Geometry(2, channels, (side, 19), (3, 2), (2, 1), padding=(1, 1, 1, 0)), rows, isa)
    compare(Geometry(1, 3, (23, 37), (7, 7), (2, 2), padding=(3, 3, 3, 3)), 16, isa, threads=3)
    compare(Geometry(1, 64, (70, 71), (1, 1)), 6, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count(isa):
    rng = np.random.default_rng(2)
    for groups in (1, 8):
        geometry = Geometry(3, 8, (21, 35), (3, 3), padding=(1, 1, 1, 1), groups=groups)
        weight, x = draw(rng, geometry, 16, 0.0)
        wanted = kernels.conv2d(pack(weight), x, geometry, isa=isa)
        for threads in (2, 3, 7, 64):
            y = kernels.conv2d(pack(weight), x, geometry, threads=threads, isa=isa)
            assert y.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_where_the_kernel_sees_it(isa):
    geometry = Geometry(1, 2, (9, 33), (3, 3), padding=(1, 1, 1, 1), groups=2)
    weight, x = draw(np.random.default_rng(4), geometry, 2, 0.0)
    x[0, 1, 4, 20] = np.nan
    y = kernels.conv2d(pack(weight), x, geometry, isa=isa)
    assert np.isfinite(y[0, 0]).all()
    reached = np.zeros((9, 33), bool)
    reached[3:6, 19:22] = True
    np.testing.assert_array_equal(np.isnan(y[0, 1]), reached)

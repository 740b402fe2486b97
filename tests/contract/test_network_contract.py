"""Convolutions that feed each other on every instruction set, against torch in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels import INPUT, Geometry, Step

ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]
TORCH = {"": lambda y: y, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu}


pytestmark = pytest.mark.usefixtures("split_small_work")


def points(channels: int, size: tuple[int, int]) -> Geometry:
    return Geometry(1, channels, size, (1, 1))


def depthwise(channels: int, size: tuple[int, int], stride: int = 1) -> Geometry:
    return Geometry(1, channels, size, (3, 3), (stride, stride), (1, 1), (1, 1, 1, 1), channels)


def full(channels: int, size: tuple[int, int], stride: int = 1) -> Geometry:
    return Geometry(1, channels, size, (3, 3), (stride, stride), (1, 1), (1, 1, 1, 1))


def inverted(size: tuple[int, int]) -> list[Step]:
    """A stem, an inverted residual block, one with a stride, and a last convolution."""
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return [
        Step(full(3, size), 5, INPUT, None, "relu6"),
        Step(points(5, size), 18, 0, None, "relu6"),
        Step(depthwise(18, size), 18, 1, None, "relu6"),
        Step(points(18, size), 5, 2, 0),
        Step(points(5, size), 16, 3, None, "silu"),
        Step(depthwise(16, size, 2), 16, 4, None, "relu"),
        Step(points(16, half), 33, 5, None, "gelu"),
    ]


def bottleneck(size: tuple[int, int]) -> list[Step]:
    """One whose sum has the input in it, and one whose sum is a convolution of it."""
    return [
        Step(points(6, size), 4, INPUT, None, "relu"),
        Step(full(4, size), 4, 0, None, "relu"),
        Step(points(4, size), 6, 1, INPUT, "relu"),
        Step(full(6, size), 3, 2, None, "relu"),
        Step(points(6, size), 9, 2),
        Step(points(3, size), 9, 3, 4, "relu"),
    ]


NETWORKS = {
    f"{build.__name__} {size}": build(size)
    for build in (inverted, bottleneck)
    for size in ((1, 1), (7, 7), (8, 8), (14, 13), (28, 28))
}


def weights(steps: list[Step], seed: int, sparsity: float = 0.6):
    """(arrays [rows, columns], blobs, biases)."""
    rng = np.random.default_rng(seed)
    dense, blobs, biases = [], [], []
    for step in steps:
        shape = (step.rows, step.geometry.columns)
        kept = rng.random(shape) >= (0 if step.geometry.groups > 1 else sparsity)
        dense.append((rng.standard_normal(shape) * kept / 2).astype(np.float32))
        blobs.append(kernels.pack(dense[-1]))
        bias = rng.standard_normal(step.rows).astype(np.float32)
        biases.append(bias if rng.random() < 0.7 else None)
    return dense, blobs, biases


def images(steps: list[Step], count: int, seed: int = 0) -> np.ndarray:
    first = next(step.geometry for step in steps if step.source == INPUT)
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, first.channels, *first.size)).astype(np.float32)


def exact(steps: list[Step], dense, biases, x: np.ndarray) -> np.ndarray:
    """The same by torch, in float64."""
    made = {INPUT: torch.from_numpy(x).double()}
    for number, step in enumerate(steps):
        shape = step.geometry
        weight = torch.from_numpy(dense[number]).double()
        weight = weight.reshape(step.rows, shape.channels // shape.groups, *shape.kernel)
        bias = None if biases[number] is None else torch.from_numpy(biases[number]).double()
        y = F.conv2d(
            made[step.source], weight, bias, shape.stride, shape.padding[::2], 1, shape.groups
        )
        y = y if step.residual is None else y + made[step.residual]
        made[number] = TORCH[step.activation](y)
    return made[len(steps) - 1].numpy()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NETWORKS)
def test_matches_torch_in_float64(name, isa):
    steps = NETWORKS[name]
    dense, blobs, biases = weights(steps, 1)
    for count in (0, 1, 3):
        x = images(steps, count)
        y = kernels.network(steps, blobs, x, biases, 1 + count, isa)
        wanted = exact(steps, dense, biases, x)
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max(initial=1))


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count_and_batch(isa):
    steps = NETWORKS["inverted (14, 13)"]
    _, blobs, biases = weights(steps, 2)
    x = images(steps, 6)
    wanted = kernels.network(steps, blobs, x, biases, 1, isa)
    for threads in (2, 3, 4, 7):
        assert np.array_equal(kernels.network(steps, blobs, x, biases, threads, isa), wanted)
    one = kernels.network(steps, blobs, x[3:4], biases, 2, isa)
    np.testing.assert_array_equal(one, wanted[3:4])


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_stays_between_calls(isa):
    """Infinities of a large network do not reach a small one after it, nor from one image to the
    next."""
    large, small = NETWORKS["inverted (28, 28)"], NETWORKS["bottleneck (7, 7)"]
    x = images(large, 2)
    x[0] = np.inf
    _, blobs, biases = weights(large, 3)
    y = kernels.network(large, blobs, x, biases, 1, isa)
    assert not np.isfinite(y[0]).all()
    np.testing.assert_array_equal(y[1:], kernels.network(large, blobs, x[1:], biases, 1, isa))
    dense, blobs, biases = weights(small, 4)
    x = images(small, 1)
    y = kernels.network(small, blobs, x, biases, 1, isa)
    np.testing.assert_allclose(y, exact(small, dense, biases, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_that_are_needed_at_the_same_time_lie_apart(name):
    steps = NETWORKS[name]
    laid = kernels.arrange(steps)
    strides = laid.rows[:, 7]
    until = {read: number for number, step in enumerate(steps) for read in step.reads}
    spans = []
    for number, step in enumerate(steps[:-1]):
        begin = laid.rows[number, 5]
        span = (begin, begin + step.rows * strides[number])
        assert begin >= 0
        assert span[1] <= laid.floats
        assert strides[number] >= np.prod(step.geometry.out_size)
        for other, (low, high) in enumerate(spans):
            assert until[other] < number or span[0] >= high or span[1] <= low
        spans.append(span)
    assert laid.floats <= sum(high - low for low, high in spans)
    for number, step in enumerate(steps):
        if step.residual is not None and step.residual != INPUT:
            assert laid.rows[number, 8] == strides[step.residual]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_networks(data):
    """Any wiring: each step reads and adds any value that fits."""
    size = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    steps: list[Step] = []
    made = {INPUT: 3}
    for number in range(data.draw(st.integers(1, 6))):
        source = data.draw(st.sampled_from(sorted(made))) if steps else INPUT
        kind = data.draw(st.sampled_from([points, full, depthwise]))
        rows = made[source] if kind is depthwise else data.draw(st.sampled_from([3, 4, 20]))
        fits = [None, *(value for value in made if made[value] == rows)]
        residual = data.draw(st.sampled_from(fits))
        activation = data.draw(st.sampled_from(["", "relu", "relu6"]))
        steps.append(Step(kind(made[source], size), rows, source, residual, activation))
        made[number] = rows
    dense, blobs, biases = weights(steps, 5, data.draw(st.sampled_from([0.0, 0.5, 1.0])))
    x = images(steps, 2)
    y = kernels.network(steps, blobs, x, biases, data.draw(st.integers(1, 3)))
    wanted = exact(steps, dense, biases, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max(initial=1))


def test_misfits_are_refused():
    steps = NETWORKS["bottleneck (7, 7)"]
    _, blobs, biases = weights(steps, 6)
    x = images(steps, 1)

    def changed(number: int, **changes) -> list[Step]:
        made = list(steps)
        made[number] = dataclasses.replace(steps[number], **changes)
        return made

    for wrong, error, match in (
        (changed(0, source=0), ValueRangeError, "reads"),
        (changed(1, source=3), ValueRangeError, "come no earlier"),
        (changed(1, source=-2), ValueRangeError, "come no earlier"),
        (changed(1, activation="tanh"), ValueRangeError, "unknown"),
        (changed(1, rows=5), ShapeError, "takes"),
        (changed(2, residual=0), ShapeError, "adds"),
        (changed(0, geometry=Geometry(2, 6, (7, 7), (1, 1))), ValueRangeError, "images"),
        ([], ValueRangeError, "reads its input"),
    ):
        with pytest.raises(error, match=match):
            kernels.network(wrong, blobs[: len(wrong)], x, biases[: len(wrong)])
    with pytest.raises(ValueRangeError, match="one blob"):
        kernels.network(steps, blobs[1:], x, biases)
    with pytest.raises(ShapeError, match="its step wants"):
        kernels.network(steps, blobs[::-1], x, biases)
    with pytest.raises(ShapeError, match="x is"):
        kernels.network(steps, blobs, x[:, 1:], biases)
    with pytest.raises(ShapeError, match="a bias is"):
        kernels.network(steps, blobs, x, [x[0], *biases[1:]])
    with pytest.raises(ValueRangeError, match="threads"):
        kernels.network(steps, blobs, x, biases, 0)


@pytest.mark.skipif(kernels.network_ptr is None, reason="the native module is not built")
def test_the_native_call_refuses_what_lies_outside():
    steps = NETWORKS["bottleneck (7, 7)"]
    _, blobs, _ = weights(steps, 7)
    x = images(steps, 1)
    laid = kernels.arrange(steps)
    y = np.empty((1, 9, 7, 7), np.float32)
    rows = laid.rows.copy()
    rows[:, 0] = [blob.ctypes.data for blob in blobs]

    def call(table: np.ndarray, floats: int = laid.floats, floats_in: int = laid.floats_in) -> None:
        kernels.network_ptr(
            table.ctypes.data, len(table), 1, x.ctypes.data, y.ctypes.data, floats_in,
            laid.floats_out, floats, 1, -1,
        )  # fmt: skip

    call(rows)
    with pytest.raises(ValueRangeError, match="lie where"):
        call(rows, floats=laid.floats - 1)
    with pytest.raises(ValueRangeError, match="lie where"):
        call(rows, floats_in=laid.floats_in - 1)
    wrongs = [(2, 3), (3, -2), (3, -4), (4, -2), (5, -1), (5, 1 << 40), (6, 3), (7, 3), (9, 2)]
    for column, value in wrongs:
        wrong = rows.copy()
        wrong[1, column] = value
        with pytest.raises((ValueRangeError, ShapeError, FormatError)):
            call(wrong)

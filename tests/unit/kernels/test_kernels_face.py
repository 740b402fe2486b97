from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError


@pytest.fixture
def weight():
    rng = np.random.default_rng(0)
    return np.where(rng.random((20, 30)) < 0.7, 0, rng.standard_normal((20, 30))).astype(np.float32)


def test_shapes_dtypes_and_names_are_checked(weight):
    blob = kernels.pack(weight)
    x = np.ones((4, 30), np.float32)
    with pytest.raises(ShapeError, match="K = 30"):
        kernels.linear(blob, x[:, :29])
    with pytest.raises(ShapeError, match=r"\[K, N\]"):
        kernels.matmul_planes(blob, x)
    with pytest.raises(ShapeError, match=r"\[N, K\]"):
        kernels.linear(blob, x[0])
    with pytest.raises(ValueRangeError, match="float64"):
        kernels.linear(blob, x.astype(np.float64))
    with pytest.raises(ShapeError, match=r"float32 \[20\]"):
        kernels.linear(blob, x, bias=np.ones(19, np.float32))
    with pytest.raises(ShapeError, match="float64"):
        kernels.linear(blob, x, bias=np.ones(20))
    with pytest.raises(ValueRangeError, match="threads"):
        kernels.linear(blob, x, threads=0)
    with pytest.raises(ValueRangeError, match="not available"):
        kernels.linear(blob, x, isa="mmx")
    with pytest.raises(FormatError):
        kernels.linear(blob[:-1], x)


@pytest.fixture(params=["face", "reference"])
def pointers(request):
    return kernels if request.param == "face" else kernels.addresses


def test_pointer_calls_agree_with_arrays(pointers, weight):
    rng = np.random.default_rng(1)
    blob = kernels.pack(weight)
    for n in (0, 1, 2, 33):
        x = rng.standard_normal((n, 30)).astype(np.float32)
        bias = rng.standard_normal(20).astype(np.float32)
        wanted = np.maximum(x.astype(np.float64) @ weight.T + bias, 0)
        y = np.full((n, 20), np.nan, np.float32)
        args = (blob.ctypes.data, x.ctypes.data, y.ctypes.data, n, bias.ctypes.data)
        pointers.linear_ptr(*args, kernels.ACTIVATIONS["relu"], 2)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
        planes, out = np.ascontiguousarray(x.T), np.full((20, n), np.nan, np.float32)
        args = (blob.ctypes.data, planes.ctypes.data, out.ctypes.data, n, bias.ctypes.data)
        pointers.planes_ptr(*args, kernels.ACTIVATIONS["relu"], 1, n, n)
        np.testing.assert_allclose(out, wanted.T, rtol=1e-5, atol=1e-5)


def test_pointer_calls_check_nulls_and_sizes(pointers, weight):
    blob = kernels.pack(weight)
    x, y = np.ones((2, 30), np.float32), np.ones((2, 20), np.float32)
    b, p, q = blob.ctypes.data, x.ctypes.data, y.ctypes.data
    for args in [(0, p, q, 2), (b, 0, q, 2), (b, p, 0, 2), (b, p, q, -1), (b, p, q, 2, 0, 0, 0)]:
        with pytest.raises(ValueRangeError):
            pointers.linear_ptr(*args)
    with pytest.raises(ValueRangeError, match="stride"):
        pointers.planes_ptr(b, p, q, 2, 0, 0, 1, 1, 2)
    blob[0] = 0
    with pytest.raises(FormatError):
        pointers.linear_ptr(b, p, q, 2)


def test_empty_pointers_are_fine_where_nothing_is_read(pointers, weight):
    blob = kernels.pack(weight)
    pointers.linear_ptr(blob.ctypes.data, 0, 0, 0)
    y = np.ones((3, 4), np.float32)
    blob = kernels.pack(np.zeros((4, 0), np.float32))
    pointers.linear_ptr(blob.ctypes.data, 0, y.ctypes.data, 3)
    assert not y.any()


def run(code, **variables):
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


USE = """
import numpy as np
from prunus import kernels
w = np.eye(5, dtype=np.float32); w[0, 3] = 2
blob = kernels.pack(w)
x = np.arange(10, dtype=np.float32).reshape(2, 5)
assert np.array_equal(kernels.linear(blob, x), x @ w.T)
assert np.array_equal(kernels.matmul_planes(blob, x.T), w @ x.T)
y = np.empty((2, 5), np.float32)
kernels.linear_ptr(blob.ctypes.data, x.ctypes.data, y.ctypes.data, 2)
assert np.array_equal(y, x @ w.T)
assert np.array_equal(kernels.unpack(kernels.transpose(blob)), w.T)
print(kernels.active_isa(), kernels.available_isas(), len(kernels.table()))
"""


def test_fallback_on_request_is_silent_and_complete():
    result = run(USE, PRUNUS_NATIVE="0")
    assert result.stdout.startswith("numpy ('numpy',)")
    assert "RuntimeWarning" not in result.stderr


def test_a_missing_module_warns_once_with_the_remedy():
    hide = "import sys; sys.modules['prunus._native'] = None\n"
    result = run(hide + USE + "import importlib, prunus.kernels.face\n", PRUNUS_NATIVE="")
    assert result.stdout.startswith("numpy")
    assert result.stderr.count("RuntimeWarning") == 1
    assert "pip install" in result.stderr


@pytest.mark.skipif(kernels.active_isa() == kernels.FALLBACK, reason="no native module")
def test_prunus_isa_may_only_lower():
    available = kernels.available_isas()
    for isa in available:
        result = run(USE, PRUNUS_ISA=isa)
        assert result.stdout.startswith(isa + " ")
        assert "RuntimeWarning" not in result.stderr
    result = run(USE, PRUNUS_ISA="avx1024")
    assert result.stdout.startswith(available[-1] + " ")
    assert result.stderr.count("PRUNUS_ISA=avx1024 is ignored") == 1

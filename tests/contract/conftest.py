"""What the batteries of the kernels share."""

from __future__ import annotations

import pytest

from prunus import kernels


@pytest.fixture
def split_small_work():
    """Let small products be shared between threads, too; the NumPy kernels have none."""
    if kernels.active_isa() == kernels.FALLBACK:
        yield
        return
    native = pytest.importorskip("prunus._native")
    grain = native.grain()
    native.set_grain(1)
    yield
    native.set_grain(grain)

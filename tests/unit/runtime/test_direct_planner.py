"""When the planner offers the direct way, and what it is held against."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import kernels
from prunus.runtime import compile, decide, whole
from prunus.runtime.candidates import Candidate, dense_layer, is_direct, layer_of, ways_of
from prunus.runtime.dense import DenseLayer
from prunus.runtime.plan import DIRECT
from prunus.runtime.switch import rows_of


@pytest.fixture
def clock(monkeypatch):
    """(names timed for layers, seconds by name to give): others take one second."""
    timed, seconds = [], {}

    def fake(runs, *, budget):
        timed.append(list(runs))
        for run in runs.values():
            run()
        return {name: seconds.get(name, 1.0) for name in runs}

    monkeypatch.setenv("PRUNUS_CACHE", "")
    monkeypatch.setattr(decide, "interleaved", fake)
    monkeypatch.setattr(
        whole, "interleaved", lambda runs, *, budget: {n: float("dense" in n) + 1 for n in runs}
    )
    return timed, seconds


def depthwise(sparsity=0.0):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    with torch.no_grad():
        conv.weight *= torch.rand_like(conv.weight) >= sparsity
    return nn.Sequential(conv).eval()


def row(sparsity=0.0, **options):
    return compile(depthwise(sparsity), torch.randn(1, 8, 9, 9), **options).plan.rows[0]


needs_native = pytest.mark.skipif(
    kernels.active_isa() == kernels.FALLBACK, reason="no native module"
)


@needs_native
def test_direct_is_timed_below_the_minimum_only_and_then_instead_of_csr(clock):
    timed, seconds = clock
    seconds[DIRECT] = 0.5
    found = row()
    assert timed == [[DIRECT, "dense", decide.APART]]
    assert (found.choice, found.reason) == (DIRECT, "less than 25% sparse; 2.00x dense")
    assert not found.sparse
    timed.clear()
    seconds["csr"] = 0.5
    assert row(0.7).choice == "csr"
    assert row(minimum_sparsity=0.0).choice == "csr"
    assert timed == [["csr", "dense", decide.LAST]] * 2


@needs_native
def test_direct_has_to_draw_level_with_torch_in_either_layout(clock):
    _, seconds = clock
    seconds.update({DIRECT: 0.5, decide.APART: 0.47})
    assert row().choice == "dense"
    seconds[decide.APART] = 0.48
    assert row().choice == DIRECT
    seconds[decide.APART] = 0.6
    assert row().choice == DIRECT
    seconds["dense"] = 0.4
    assert row().choice == "dense"


def test_without_the_native_module_nothing_is_timed(clock, monkeypatch):
    monkeypatch.setattr(kernels, "active_isa", lambda: kernels.FALLBACK)
    assert row().reason == "less than 25% sparse"
    assert clock[0] == []


def test_who_may_run_direct():
    for module, fits in (
        (nn.Conv2d(4, 8, 3), True),
        (nn.Conv2d(5, 8, 3), False),
        (nn.Conv1d(8, 8, 3, groups=2), True),
        (nn.Linear(3, 3), False),
    ):
        ways: dict[str, Candidate] = ways_of(layer_of("x", module), module, torch.float32)
        assert (DIRECT in ways) == is_direct(module) == fits


def test_conv1d_as_dense_layer_and_its_rows():
    assert rows_of("conv1d", (2, 3, 7)) == 14
    for options in ({"padding": 2, "stride": 2}, {"padding": 1, "padding_mode": "circular"}):
        conv = nn.Conv1d(4, 6, 3, groups=2, **options).eval()
        held, x = dense_layer(conv), torch.randn(2, 4, 11)
        assert isinstance(held, DenseLayer)
        torch.testing.assert_close(held(x), conv(x), rtol=0, atol=0)
    plan = compile(nn.Sequential(conv), x, choose=lambda layer: "dense bf16", dtype=torch.bfloat16)
    assert plan.plan.rows[0].choice == "dense bf16"
    torch.testing.assert_close(plan(x), conv(x), rtol=3e-2, atol=3e-2)

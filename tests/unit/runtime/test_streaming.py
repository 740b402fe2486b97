"""Weights beyond the caches: the bytes that a way reads count beside its time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.runtime import cache, compile, decide, streaming, whole
from prunus.runtime.plan import Plan
from prunus.runtime.whole import EVEN, Form, judged


def pruned(size, sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) >= sparsity
    return model.eval()


def test_the_largest_cache_and_the_speed_of_memory_are_plausible(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert 1 << 15 <= streaming.last_level() < 1 << 33
    assert not streaming.streams(1000)
    assert streaming.streams(streaming.last_level())
    seconds = streaming.seconds_per_byte({"threads": 1})
    assert 1e-12 < seconds < 1e-8  # 0.1 GB/s to 1 TB/s
    assert streaming.seconds_per_byte({"threads": 1}) == seconds  # from the disk


def test_sizes_are_those_of_the_weights_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    built = []

    def build(name):
        built.append(name)
        return nn.Linear(8, 4).to(torch.bfloat16 if name == "half" else torch.float32)

    wanted = {"whole": 4.0 * 36, "half": 2.0 * 36}
    assert streaming.sizes({}, ["whole", "half"], build) == wanted
    assert streaming.sizes({}, ["whole", "half"], build) == wanted
    assert built == ["whole", "half"]


@pytest.mark.parametrize("far", [False, True])
def test_fewer_bytes_win_where_weights_come_from_memory(far, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    # fp32 is a little faster in the caches
    hot = {"bitmap": 1.0e-5, "bitmap bf16": 1.1e-5, "dense": 3e-5}
    monkeypatch.setattr(
        decide, "interleaved", lambda runs, **rest: {n: hot.get(n, 1e-4) for n in runs}
    )
    monkeypatch.setattr(
        whole, "interleaved", lambda runs, **rest: {n: 1 + ("dense" in n) for n in runs}
    )
    monkeypatch.setattr(streaming, "streams", lambda nonzeros: far)
    monkeypatch.setattr(streaming, "seconds_per_byte", lambda key: 1e-9)
    fast = compile(pruned(64, 0.7), torch.zeros(1, 64), dtype=torch.bfloat16)
    ways = {row.choice for row in fast.plan.rows}
    assert ways == ({"bitmap bf16"} if far else {"bitmap"})


@pytest.mark.parametrize(("seconds", "half"), [(EVEN - 0.01, True), (EVEN + 0.01, False)])
def test_a_form_in_bfloat16_that_is_about_as_fast_is_taken(seconds, half):
    plan = Plan((), 1, "avx2", "box", "")
    times = {Form(False): [3.0], Form(True): [1.0], Form(True, half=True): [seconds]}
    assert judged(plan, times)[1] == Form(True, half=half)


def test_a_form_in_bfloat16_that_is_slower_than_dense_is_not_taken():
    plan = Plan((), 1, "avx2", "box", "")
    times = {Form(False): [1.01], Form(True): [1.0], Form(True, half=True): [1.02]}
    assert judged(plan, times)[1] == Form(True)

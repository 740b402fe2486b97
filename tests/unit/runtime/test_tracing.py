"""Traces are torch's own, and no other thread notices them."""

from __future__ import annotations

import copy
import math
import os
import threading
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import is_fx_tracing

from prunus.drive import prune
from prunus.methods import one_shot_magnitude
from prunus.runtime import compile, part, tracing
from prunus.runtime.tracing import Tracer, quietly


@fx.wrap
def twice_if_long(x: Tensor) -> Tensor:
    """Cannot be traced through."""
    return x * 2 if len(x) > 1 else x


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.ones(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.shift


class Outer(nn.Module):
    """Parameters, constants, shared modules, functions of math and wrapped ones, an option."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.weight = Inner(), nn.Parameter(torch.ones(4, 4))
        self.two, self.constant = self.one, torch.arange(4.0)
        self.rest = nn.Sequential(nn.ReLU(), Inner(), nn.LayerNorm(4))

    def forward(self, x: Tensor, flag: bool = True, y: Tensor | None = None) -> tuple[Any, ...]:
        x = self.one(x) / math.sqrt(x.size(-1)) / sqrt(x.size(0)) + self.constant
        x = F.linear(self.two(x), self.weight)
        x = twice_if_long(x) if flag else x
        return self.rest(x), {"x": x if y is None else y}


@pytest.mark.parametrize("defaults", [{"flag": False}, {"flag": True, "y": None}])
def test_a_trace_is_that_of_torch(defaults):
    model = Outer()
    before = {name: type(module) for name, module in model.named_modules()}
    found = Tracer().trace(model, dict(defaults))
    theirs = fx.Tracer()
    theirs.proxy_buffer_attributes = True
    wanted = theirs.trace(model, dict(defaults))
    assert str(found) == str(wanted)
    facts = [
        [(n.op, getattr(n.target, "__name__", n.target), n.args) for n in graph.nodes]
        for graph in (found, wanted)
    ]
    assert str(facts[0]) == str(facts[1])
    assert {name: type(module) for name, module in model.named_modules()} == before
    x = torch.randn(3, 4)
    given = (x, defaults["flag"], None) if "y" in defaults else (x, defaults["flag"], x)
    for one, other in zip(fx.GraphModule(model, found)(*given), model(*given), strict=True):
        torch.testing.assert_close(one, other)


class Curious(nn.Module):
    """Runs something while it is traced."""

    def __init__(self, asked: Any) -> None:
        super().__init__()
        self.asked, self.linear = asked, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.asked()
        return self.linear(x)


def test_tracing_changes_no_other_modules():
    seen: list[Any] = []
    call, lookup = nn.Module.__call__, nn.Module.__getattr__
    other = nn.Linear(4, 4)

    def ask() -> None:
        seen.append((nn.Module.__call__ is call, nn.Module.__getattr__ is lookup))
        seen.append((is_fx_tracing(), type(other(torch.ones(4))) is Tensor))

    assert quietly(Tracer(), Curious(ask)) is not None
    assert seen == [(True, True), (False, True)]


def test_what_fails_is_left_as_it_was():
    def fail() -> None:
        raise ValueError("not with proxies")

    model = Curious(fail)
    assert quietly(Tracer(), model) is None
    assert (type(model), type(model.linear)) == (Curious, nn.Linear)
    with pytest.raises(ValueError, match="not with proxies"):
        Tracer().trace(model)
    assert type(model) is Curious
    assert math.sqrt.__module__ == "math"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_traces_can_trace():
    inside, done = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        done.wait(20)

    other = threading.Thread(target=quietly, args=(Tracer(), Curious(wait)))
    other.start()
    assert inside.wait(20)
    child = os.fork()
    if child == 0:
        traced = quietly(Tracer(), Outer(), {"flag": True, "y": None})
        os._exit(0 if traced is not None else 1)
    done.set()
    other.join()
    finished = []
    waiter = threading.Thread(target=lambda: finished.append(os.waitpid(child, 0)[1]), daemon=True)
    waiter.start()
    waiter.join(30)
    if not finished:
        os.kill(child, 9)
    assert finished == [0]


class Residual(nn.Module):
    """Something of everything that compiling rewrites."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(F.relu(self.norm(self.conv(x)))) + x)


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    parts = [nn.Conv2d(3, 8, 3, padding=1), Residual(8), nn.Flatten(), nn.Linear(8 * 36, 10)]
    model = nn.Sequential(*parts).eval().requires_grad_(False)
    prune(model, one_shot_magnitude(0.7))
    return model


@pytest.mark.parametrize("wrapped", [False, True])
def test_copies_of_rewritten_graph_modules_keep_what_was_fused(wrapped):
    """fx.GraphModule copies itself by writing its forward pass anew."""
    model, x = _model(3), torch.randn(2, 3, 6, 6)
    traced: nn.Module = fx.symbolic_trace(model)
    traced = nn.Sequential(traced, nn.Identity()) if wrapped else traced
    fast: Any = compile(traced, x, choose=lambda layer: "csr")
    assert any("residual" in row.fused for row in fast.plan.rows)
    for made in (fast, copy.deepcopy(fast), copy.copy(fast), copy.deepcopy(copy.deepcopy(fast))):
        torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    last: Any = compile(fast, x, choose=lambda layer: "csr")
    torch.testing.assert_close(last(x), model(x), rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(fast)
    with torch.no_grad():
        for buffer in again.buffers():
            buffer.zero_()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_scopes_of_graph_modules_are_copied():
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    part.redirect(model)
    made, x = copy.deepcopy(model), torch.randn(2, 4)
    assert type(made) is type(model)
    assert made.get_submodule("0") is not model.get_submodule("0")
    torch.testing.assert_close(made(x), model(x))


def test_models_compile_while_others_run(monkeypatch, tmp_path):
    """Two threads compile again and again, others run compiled, plain and compiling models."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    x = torch.randn(2, 3, 6, 6)
    plain = [_model(seed) for seed in range(2)]
    wanted = [model(x) for model in plain]
    ready = [compile(model, x, choose=lambda layer: "csr") for model in plain]
    stop, failures, runs = threading.Event(), [], [0, 0, 0]

    def guarded(step: Any) -> None:
        try:
            while not stop.is_set():
                step()
        except BaseException as error:
            failures.append(error)
            raise

    def run(which: int) -> None:
        for models in (ready, plain):
            torch.testing.assert_close(models[which](x), wanted[which], rtol=1e-4, atol=1e-5)
        runs[which] += 1

    def build(which: int) -> None:
        made: Any = compile(plain[which], x, choose=lambda layer: "csr")
        torch.testing.assert_close(made(x), wanted[which], rtol=1e-4, atol=1e-5)
        assert made.plan.networks or made.plan.rows[1].fused == "batch norm, relu"
        runs[2] += 1

    steps = [(run, 0), (run, 1), (build, 0), (build, 1)]
    threads = [
        threading.Thread(target=guarded, args=(lambda step=step, n=n: step(n),))
        for step, n in steps
    ]
    for thread in threads:
        thread.start()
    stop.wait(3.0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(runs) >= 4
    assert tracing.nn.Module.__call__.__module__ == "torch.nn.modules.module"

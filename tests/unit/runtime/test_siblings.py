"""Merged siblings: found by watching, joined in graphs or scoped around calls, always right."""

from __future__ import annotations

import copy
import dataclasses
import io
import threading

import pytest
import torch
from torch import nn

from prunus.runtime import SparseLinear, compile, load, save, siblings
from prunus.runtime import ops as operators
from prunus.runtime.part import LinearPart, install, split

SIZES = (5, 7, 4)


class Attention(nn.Module):
    """Three layers on one tensor; torch.fx cannot trace the branch on values."""

    def __init__(self, traceable=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, size) for size in SIZES)
        self.o = nn.Linear(sum(SIZES), 12)
        self.traceable = traceable
        self.fails = False

    def forward(self, x):
        if not self.traceable and x.sum() == 12345:
            return x
        q = self.q(x)
        if self.fails:
            raise KeyError("between")
        return self.o(torch.cat([q, self.k(x), self.v(x)], -1)) + x


class Model(nn.Module):
    def __init__(self, traceable=False):
        super().__init__()
        self.one, self.two = Attention(traceable), Attention(traceable)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def pruned(module, sparsity=0.7):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) >= sparsity
    return module.eval().requires_grad_(False)


def csr(layer):
    return "csr"


def merged(model, x, monkeypatch):
    """Compiled with every group merged, whatever the clock says."""
    monkeypatch.setattr(siblings, "_faster", lambda *rest: True)
    plan = compile(model, x, choose=csr).plan
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "q"]
    groups = tuple(tuple(name[:-1] + part for part in "qkv") for name in names)
    return compile(model, x, choose=dataclasses.replace(plan, merged=groups).choose)


@pytest.fixture
def products(monkeypatch):
    """How many sparse products run."""
    count, real = [0], operators.linear_rows

    def counting(*arguments):
        count[0] += 1
        return real(*arguments)

    monkeypatch.setattr(operators, "linear_rows", counting)
    monkeypatch.setattr("prunus.runtime.modules.linear_rows", counting)
    return count


@pytest.mark.parametrize("traceable", [True, False])
def test_siblings_run_as_one_and_compute_the_same(traceable, monkeypatch, products):
    model, x = pruned(Model(traceable)), torch.randn(2, 3, 12)
    fast = merged(model, x, monkeypatch)
    assert fast.plan.merged == (("one.q", "one.k", "one.v"), ("two.q", "two.k", "two.v"))
    assert "6 merged into 2" in str(fast.plan)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        products[0] = 0
        with context():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        assert products[0] == 4  # two merged, two outputs
    assert isinstance(fast.one.k, LinearPart)
    assert type(fast.one).__name__ == "Attention"
    assert isinstance(fast.one, Attention)
    for name in "qkv":
        part, dense = fast.one.get_submodule(name), model.one.get_submodule(name)
        assert torch.equal(part.weight, dense.weight)
        assert torch.equal(part.bias, dense.bias)
        torch.testing.assert_close(part(x), dense(x), rtol=1e-4, atol=1e-5)


def test_the_clock_decides_and_the_groups_are_those_of_one_tensor(monkeypatch):
    model, x = pruned(Model()), torch.randn(2, 3, 12)
    asked = []

    def slower(group, *rest):
        asked.append(group.names)
        return False

    monkeypatch.setattr(siblings, "_faster", slower)
    monkeypatch.setattr(
        "prunus.runtime.decide.interleaved",
        lambda runs, budget: {name: 1.0 if name == "csr" else 2.0 for name in runs},
    )
    assert compile(model, x).plan.merged == ()
    assert asked == [("one.q", "one.k", "one.v"), ("two.q", "two.k", "two.v")]

    class Other(Attention):
        def forward(self, x):
            x = x * 1.0
            q, k = self.q(x), self.k(x.clone())
            x += 1.0
            return self.o(torch.cat([q, k, self.v(x)], -1))

    asked.clear()
    compile(pruned(Other()), x)
    assert asked == []


def scope(order):
    """(parent that calls the parts in this order, dense layers)."""
    dense = pruned(nn.ModuleList(nn.Linear(12, size) for size in SIZES))
    layers = siblings.parts_of([SparseLinear.from_dense(layer) for layer in dense])

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(layers)

        def forward(self, x, between=lambda step, x: x):
            found = []
            for step, number in enumerate(order):
                x = between(step, x)
                found.append(self.parts[number](x))
            return found

    parent = Parent()
    install(parent, layers[0])
    return parent, dense


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,), (1, 1, 0), (0, 0, 0), (2, 1)])
def test_any_order_and_number_of_calls_is_right(order, products):
    parent, dense = scope(order)
    for seed in range(3):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
        for found, number in zip(parent(x), order, strict=True):
            torch.testing.assert_close(found, dense[number](x), rtol=1e-4, atol=1e-5)
    assert products[0] == 3 * max(order.count(number) for number in order)
    assert parent.parts[0].meeting.calls.frames == []


def test_an_input_that_changes_between_two_parts_is_multiplied_again():
    parent, dense = scope((0, 1, 2))

    def between(step, x):
        return x.mul_(2.0) if step == 1 else x

    x = torch.randn(4, 12)
    first = x.clone()
    found = parent(x, between)
    for layer, output, wanted in zip(dense, found, (first, 2 * first, 2 * first), strict=True):
        torch.testing.assert_close(output, layer(wanted), rtol=1e-4, atol=1e-5)
    # The same tensor object with other contents, in the next call, is new as well.
    found = parent(x.copy_(first))
    torch.testing.assert_close(found[2], dense[2](first), rtol=1e-4, atol=1e-5)

    def equal(step, x):
        return x.clone()

    torch.testing.assert_close(parent(first, equal)[1], dense[1](first), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        other = torch.randn(4, 12)
        parent(other)
        other.mul_(3.0)
        torch.testing.assert_close(parent(other)[1], dense[1](other), rtol=1e-4, atol=1e-5)


def test_gradients_are_not_taken_from_a_product_without_them():
    parent, dense = scope((0, 1))

    def between(step, x):
        torch.set_grad_enabled(step == 1)
        return x

    x = torch.randn(3, 12, requires_grad=True)
    with torch.no_grad():
        found = parent(x, between)
    assert not found[0].requires_grad
    (found[1].sum()).backward()
    torch.testing.assert_close(x.grad, dense[1].weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)


def test_an_exception_leaves_nothing_behind(monkeypatch):
    model, x = pruned(Model()), torch.randn(2, 3, 12)
    fast = merged(model, x, monkeypatch)
    fast.two.fails = True
    with pytest.raises(KeyError, match="between"):
        fast(x)
    assert fast.two.q.meeting.calls.frames == []
    fast.two.fails = False
    torch.testing.assert_close(fast(x + 1), model(x + 1), rtol=1e-4, atol=1e-5)


def test_threads_do_not_meet(monkeypatch):
    model = pruned(Model())
    fast = merged(model, torch.randn(2, 3, 12), monkeypatch)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            x = torch.randn(1 + seed % 3, 12, generator=generator)
            with torch.no_grad():
                if not torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("traceable", [True, False])
def test_merged_models_copy_store_compile_and_export(traceable, monkeypatch, products, tmp_path):
    model, x = pruned(Model(traceable)), torch.randn(2, 3, 12)
    fast = merged(model, x, monkeypatch)
    twin = copy.deepcopy(fast)
    assert twin.one.q.meeting is not fast.one.q.meeting
    assert twin.one.k.whole is twin.one.q.merged
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    other = merged(pruned(Model(traceable), 0.2), x, monkeypatch)
    save(fast, tmp_path / "file")
    load(tmp_path / "file", other)
    for copied in (twin, again, other):
        assert torch.equal(copied(x), fast(x))
    if not traceable:
        assert type(twin.one) is type(again.one) is type(fast.one)
        return
    torch._dynamo.reset()
    with torch.no_grad():
        graph = torch.compile(fast, fullgraph=True, backend="aot_eager")
        graph(x)
        exported = torch.export.export(fast, (x,)).module()
        for form in (graph, exported):
            products[0] = 0
            torch.testing.assert_close(form(x), model(x), rtol=1e-4, atol=1e-5)
            assert products[0] == 4


def test_parts_share_inside_compiled_and_exported_graphs(products):
    parent, dense = scope((0, 1, 2))
    x = torch.randn(4, 12)
    torch._dynamo.reset()
    with torch.no_grad():
        graph = torch.compile(parent, fullgraph=True, backend="aot_eager")
        graph(x)
        for form in (graph, torch.export.export(parent, (x,)).module()):
            products[0] = 0
            for found, layer in zip(form(x), dense, strict=True):
                torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)
            assert products[0] == 1
    assert parent.parts[0].meeting.traced == []


def test_layers_without_bias_merge_with_those_that_have_one():
    dense = pruned(nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 2, bias=False)]))
    parts = siblings.parts_of([SparseLinear.from_dense(layer) for layer in dense])
    x = torch.randn(5, 6)
    for part, layer in zip(parts, dense, strict=True):
        torch.testing.assert_close(part(x), layer(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[3, 3\] rows do not make 5"):
        split(parts[0].whole, [3, 3])

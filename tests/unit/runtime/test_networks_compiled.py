"""Modules of nothing but packed convolutions: found, run by one call, and given up where needed."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

from prunus import kernels
from prunus.bench.models_large import Bottleneck, InvertedResidual
from prunus.errors import ShapeError
from prunus.runtime import SparseConv2d, compile, decide, network, networks
from prunus.runtime.forward import Forward
from prunus.runtime.network import Network

native = pytest.mark.skipif(kernels.network_ptr is None, reason="the native module is not built")
pytestmark = native


def pruned(model: Any, sparsity: float = 0.7) -> Any:
    """Weights removed at random, batch norms with statistics that fit."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert module.running_mean is not None
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval().requires_grad_(False)


class Classifier(nn.Module):
    """Features that are a network, and what follows them."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        blocks = [InvertedResidual(8, 8, 1, 3), InvertedResidual(8, 12, 2, 3), Bottleneck(12, 4, 1)]
        self.features = nn.Sequential(first, *blocks)
        self.classifier = nn.Linear(16, 5)

    def forward(self, images):
        """Logits."""
        return self.classifier(self.features(images).mean((2, 3)))


def csr(layer) -> str:
    return "csr" if layer.kind == "conv2d" else "dense"


X = torch.randn(2, 3, 19, 22, generator=torch.Generator().manual_seed(3))


def compiled(model: nn.Module | None = None, x: torch.Tensor = X) -> Any:
    return compile(pruned(Classifier()) if model is None else model, x, choose=csr)


def calls(monkeypatch) -> list[int]:
    """Counts the calls of the kernels for networks, by their steps."""
    made: list[int] = []
    real = kernels.network_ptr

    def counting(*args):
        made.append(args[1])
        return real(*args)

    monkeypatch.setattr(kernels, "network_ptr", counting)
    return made


def test_a_module_of_convolutions_runs_by_one_call(monkeypatch):
    model = pruned(Classifier())
    fast = compiled(model)
    made = calls(monkeypatch)
    assert fast.plan.networks == ("features",)
    assert "1 networks" in str(fast.plan)
    assert fast.plan.to_dict()["networks"] == ["features"]
    for x in (X, torch.randn(1, 3, 7, 5), torch.randn(3, 3, 32, 32)):
        exact = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(fast(x).double(), exact, rtol=1e-4, atol=1e-5)
    assert made == [11, 11, 11]
    last = X.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(last), fast(X), rtol=0, atol=0)


def test_names_and_state_are_those_of_the_layers():
    fast = compiled()
    for row in fast.plan.rows:
        layer = fast.get_submodule(row.name)
        assert row.kind != "conv2d" or type(layer) is SparseConv2d
    twin = compiled(pruned(Classifier()))
    for tensor in twin.state_dict().values():
        if tensor.dtype == torch.float32:
            tensor.zero_()
    assert not torch.equal(twin(X), fast(X))
    twin.load_state_dict(fast.state_dict())
    assert torch.equal(twin(X), fast(X))
    twin.load_state_dict(copy.deepcopy(fast.state_dict()), assign=True)
    assert torch.equal(twin(X), fast(X))


def test_copies_and_pickles(monkeypatch):
    fast = compiled()
    wanted = fast(X)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    copies = [copy.deepcopy(fast), torch.load(file, weights_only=False)]
    copies.append(copy.deepcopy(copies[1]))
    made = calls(monkeypatch)
    for other in copies:
        assert type(other.features).__name__ == "Sequential"
        assert torch.equal(other(X), wanted)
        assert other.features[0][0].packed.data_ptr() != fast.features[0][0].packed.data_ptr()
    assert made == [11] * 3
    copies[0].features[3].conv3.bias.add_(1)
    assert not torch.equal(copies[0](X), wanted)
    assert torch.equal(fast(X), wanted)


def test_a_block_with_a_forward_pass_of_its_own(monkeypatch):
    model = pruned(Bottleneck(6, 4, 1))
    x = torch.randn(2, 6, 9, 9)
    fast = compiled(model, x)
    assert fast.plan.networks == ("",)
    made = calls(monkeypatch)
    wanted = model(x)
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(again(x), wanted, rtol=1e-4, atol=1e-5)
    assert made == [4, 4]
    handle = again.conv2.register_forward_hook(lambda module, args, y: y * 0)
    torch.testing.assert_close(again(x), again.relu(again.conv3(x[:, :4] * 0, again.downsample(x))))
    handle.remove()
    torch.testing.assert_close(again(x), wanted, rtol=1e-4, atol=1e-5)
    assert made == [4] * 3


def test_hooks_and_exchanged_layers_are_seen(monkeypatch):
    fast = compiled()
    wanted = fast(X)
    made = calls(monkeypatch)
    seen = []
    for name in ("features.2", "features.1.conv.0.conv", "features.3.relu"):
        module = fast.get_submodule(name)
        handle = module.register_forward_hook(lambda module, args, y: seen.append(module))
        torch.testing.assert_close(fast(X), wanted, rtol=1e-5, atol=1e-6)
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append("all"))
    fast(X)
    handle.remove()
    assert made == []
    assert seen[0] is fast.features[2]
    assert seen.count("all") > 12
    fast(X)
    assert made == [11]
    unit = fast.features[1].conv[0]
    kept = unit.conv
    unit.conv = copy.deepcopy(kept)
    unit.conv.bias.add_(1)
    other = fast(X)
    assert made == [11]
    assert not torch.allclose(other, wanted)
    unit.conv = kept
    assert torch.equal(fast(X), wanted)
    unit.norm = nn.ReLU()  # in place of nn.Identity, before the copy's first call
    changed = copy.deepcopy(fast)
    made.clear()
    changed(X)
    assert made == []


def test_what_only_the_layers_take(monkeypatch):
    fast = compiled()
    wanted = fast(X)
    made = calls(monkeypatch)
    half = fast.features(X.bfloat16())
    assert half.dtype == torch.bfloat16
    leaf = X.clone().requires_grad_(True)
    fast(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        assert torch.equal(fast(leaf), wanted)
    assert made == [11]
    single = fast.features(X[0])
    torch.testing.assert_close(single, fast.features(X)[0], rtol=1e-5, atol=1e-6)
    assert fast.features(X[:0]).shape == (0, 16, 5, 6)
    with pytest.raises(ShapeError, match="takes"):
        fast(torch.zeros(2, 4, 19, 22))
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        compiled(pruned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))))(X[..., :3])
    named = fast.features(input=X)
    torch.testing.assert_close(named, fast.features(X), rtol=1e-5, atol=1e-6)
    one = copy.deepcopy(fast).half()
    assert one.features[0][0].bias.dtype == torch.float16
    torch.testing.assert_close(one.features(X), fast.features(X), rtol=1e-2, atol=1e-2)


def test_graphs_see_the_layers():
    fast = compiled()
    exported = torch.export.export(fast, (X,))
    names = [str(node.target) for node in exported.graph.nodes]
    assert sum("prunus.sparse_conv2d" in name for name in names) == 11
    torch._dynamo.reset()
    with torch.no_grad():
        graph = torch.compile(fast, fullgraph=True, backend="eager")
        torch.testing.assert_close(graph(X), fast(X), rtol=1e-5, atol=1e-6)


def test_a_plan_is_replayed():
    model = pruned(Classifier())
    first = compiled(model)
    plan = first.plan
    again: Any = compile(model, X, choose=plan.choose)
    assert again.plan.networks == ("features",)
    none: Any = compile(model, X, choose=type(plan)(**{**vars(plan), "networks": ()}).choose)
    assert none.plan.networks == ()
    assert not isinstance(getattr(none.features, "prunus_forward", None), Network)
    torch.testing.assert_close(none(X), first(X), rtol=1e-5, atol=1e-6)


def test_the_clock_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    times = {networks.TOGETHER: 2.0, networks.APART: 1.0}
    monkeypatch.setattr(decide, "interleaved", lambda runs, budget: times)
    layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    swaps = {str(i): SparseConv2d.from_dense(layer) for i, layer in enumerate(layers)}
    options = networks.Options(1, 0.25, torch.float32, False, None)
    forwards, names = networks.place(model, X, swaps, {}, options)
    assert (forwards, names) == ({}, ())
    times[networks.TOGETHER] = 0.5
    (held,) = tmp_path.rglob("*.json")
    held.unlink()
    forwards, names = networks.place(model, X, swaps, {}, options)
    assert names == ("",)
    assert isinstance(forwards[""], Network)
    monkeypatch.setattr(decide, "interleaved", None)  # from the disk
    assert networks.place(model, X, swaps, {}, options)[1] == ("",)


class Odd(nn.Module):
    """Convolutions with something between or beside them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.kind = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), kind
        if kind == "reflect":
            self.two = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x, scale: float = 1.0):
        """Depends on the kind."""
        y = self.one(x)
        if self.kind == "both":
            return y, self.two(y)
        if self.kind == "inner":
            return self.one(x) + 0 * self.two(y)
        if self.kind == "not the last":
            self.two(y)
            return y
        return self.two(torch.tanh(y) if self.kind == "tanh" else y)


@pytest.mark.parametrize("kind", ["both", "inner", "not the last", "tanh", "reflect"])
def test_other_modules_are_no_networks(kind):
    model = pruned(Odd(kind))
    fast = compiled(model)
    assert fast.plan.networks == ()
    wanted, found = model(X), fast(X)
    pairs = zip(wanted, found, strict=True) if kind == "both" else [(wanted, found)]
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_describe_keeps_the_order_of_calls():
    block = compiled(pruned(Bottleneck(6, 4, 1)), torch.randn(1, 6, 5, 5))
    found = block.prunus_forward
    assert isinstance(found, Network)
    assert isinstance(found.before, Forward)
    assert [(link.path, link.source, link.residual) for link in found.links] == [
        ("conv1", network.INPUT, None),
        ("conv2", 0, None),
        ("downsample.0", network.INPUT, None),
        ("conv3", 1, 2),
    ]


def test_threads_share_a_model():
    fast = compiled()
    inputs = [torch.randn(1 + i % 3, 3, 9 + i, 11) for i in range(8)]
    wanted = [fast(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(fast(inputs[number]), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

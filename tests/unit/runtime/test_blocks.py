"""Functional and shared activations and residual additions fused into sparse layers, or left."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunus.runtime import SparseConv2d, SparseLinear, compile


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forced(layer):
    return "csr"


def fused(model, *inputs):
    """{layer: what it does besides} and the compiled model, checked against torch."""
    fast = compile(model, inputs, choose=forced)
    wanted = model.eval()(*[x.clone() for x in inputs])
    torch.testing.assert_close(fast(*inputs), wanted, rtol=1e-4, atol=1e-4)
    return {row.name: row.fused for row in fast.plan.rows}, fast


class Residual(nn.Module):
    """ResNet's block: one in-place ReLU in three places."""

    def __init__(self, channels=6, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(channels, channels, 1, stride), nn.Dropout())

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            identity = self.down(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    """Blocks behind a forward pass that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), Residual(stride=2)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if x.sum() < 1e9 else x
        return x

    def count(self):
        return len(self.blocks)


def test_a_resnet_block_is_fused_even_where_the_whole_cannot_be_traced():
    facts, fast = fused(Net(), draw(2, 6, 9, 8))
    assert facts == {
        "blocks.0.conv1": "",
        "blocks.0.conv2": "",
        "blocks.1.conv1": "",
        "blocks.1.conv2": "",
        "blocks.1.down.0": "residual, relu",
    }
    facts, fast = fused(nn.Sequential(Residual(), Residual(stride=2)), draw(2, 6, 9, 8))
    assert facts == {
        "0.conv1": "batch norm, relu",
        "0.conv2": "batch norm, residual, relu",
        "1.conv1": "batch norm, relu",
        "1.conv2": "batch norm, residual, relu",
        "1.down.0": "",
    }
    assert type(fast[0]) is not Residual
    assert isinstance(fast[0], Residual)
    assert type(fast[0]).__qualname__ == "Residual"


class Plain(Net):
    """Without norms, so that a layer is followed by its activation."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.bn1, block.bn2 = nn.Identity(), nn.Identity()


def test_class_methods_copies_pickles_and_state_survive():
    x = draw(2, 6, 9, 8)
    facts, fast = fused(Plain(), x)
    assert facts["blocks.0.conv2"] == facts["blocks.1.conv2"] == "residual, relu"
    assert isinstance(fast, Plain)
    assert fast.count() == 2
    wanted = fast(x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), wanted)
        assert type(other.blocks[0]).__name__ == "Residual"
        assert list(other.state_dict()) == list(fast.state_dict())
        other.blocks[0].conv2.bias.zero_()
        assert not torch.equal(other(x), wanted)
    assert torch.equal(fast(x), wanted)


def test_other_sizes_and_dtypes_than_the_example_compute_the_same():
    model = nn.Sequential(Residual()).eval()
    fast = compile(model, draw(2, 6, 9, 8), choose=forced)
    assert fast[0].conv2.activation == "relu"
    for shape in ((1, 6, 4, 5), (6, 9, 8)):
        x = draw(*shape)
        if len(shape) == 3:
            x = x[None]
        torch.testing.assert_close(fast(x), model(x.clone()), rtol=1e-4, atol=1e-4)
    x = draw(2, 6, 9, 8).requires_grad_()
    fast(x).sum().backward()
    grad, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-4)


def test_torch_compile_and_export_take_a_rewritten_model():
    model, x = nn.Sequential(Residual()).eval(), draw(2, 6, 9, 8)
    fast = compile(model, x, choose=forced)
    wanted = fast(x)
    torch.testing.assert_close(torch.compile(fast, backend="aot_eager")(x), wanted)
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), wanted)


class Function(nn.Module):
    """Two linear layers and a function of them and the input."""

    def __init__(self, function):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(7, 7), nn.Linear(7, 7), function
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.function(self, x)


FUSED = {
    "relu": (lambda m, x: m.two(F.relu(m.one(x))), "relu", ""),
    "method": (lambda m, x: m.two(m.one(x).relu_()), "relu", ""),
    "torch": (lambda m, x: torch.relu(m.two(m.one(x))), "", "relu"),
    "relu6": (lambda m, x: F.relu6(m.two(m.one(x))), "", "relu6"),
    "in place": (lambda m, x: F.relu(m.two(m.one(x)), inplace=True), "", "relu"),
    "gelu": (lambda m, x: m.two(F.gelu(m.one(x))), "gelu", ""),
    "gelu tanh": (lambda m, x: m.two(F.gelu(m.one(x), approximate="tanh")), "gelu_tanh", ""),
    "silu": (lambda m, x: m.two(F.silu(m.one(x))), "silu", ""),
    "add": (lambda m, x: m.two(m.one(x)) + x, "", "residual"),
    "add method": (lambda m, x: F.gelu(m.two(m.one(x)).add_(x)), "", "residual, gelu"),
    "add before": (lambda m, x: torch.add(x, m.one(x)).relu(), "residual, relu", ""),
    "both sparse": (lambda m, x: F.relu(m.one(x) + m.two(x)), "residual, relu", ""),
    "broadcast": (lambda m, x: F.silu(m.one(x) + x[:1]), "residual, silu", ""),
    "wider": (lambda m, x: F.silu(m.one(x) + x[None, None]), "residual, silu", ""),
    "half": (lambda m, x: F.relu(m.one(x) + x.double()), "residual, relu", ""),
}


@pytest.mark.parametrize("name", FUSED)
def test_functions_that_are_fused(name):
    function, one, two = FUSED[name]
    facts, fast = fused(Function(function), draw(5, 7))
    assert facts == {"one": one, "two": two}
    for layer, does in ((fast.one, one), (fast.two, two)):
        assert getattr(layer, "activation", "") == does.removeprefix("residual").lstrip(", ")


def writes_between(m, x):
    x = x * 1
    y = m.one(x)
    return y + m.inplace(x)


def used_twice(m, x):
    y = m.one(x)
    return F.relu(y) + y


def writes_to_the_residual(m, x):
    x = x * 1
    alias = x
    x += m.one(x)
    return alias * 2


def by_value(m, x):
    return F.relu(m.one(x)) if x.sum() < 1e9 else x


def stores(m, x):
    m.seen = x * 2
    return F.relu(m.one(x)) + m.seen


def makes_a_tensor(m, x):
    return F.relu(m.one(x)) + torch.arange(7.0)


def doubles(m, x):
    y = m.one(x)
    return y + y


def scaled(m, x):
    return torch.add(m.one(x), x, alpha=2)


def called_twice(m, x):
    return F.relu(m.one(F.relu(m.one(x))))


LEFT = {f.__name__: f for f in (writes_between, used_twice, writes_to_the_residual, by_value)}
LEFT |= {f.__name__: f for f in (stores, makes_a_tensor, doubles, scaled, called_twice)}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_fused_is_left_alone(name):
    facts, fast = fused(Function(LEFT[name]), draw(5, 7))
    assert facts["one"] == ""
    assert isinstance(fast.one, SparseLinear)


class Switch(nn.Module):
    """An argument that the example leaves at its default."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, scale=None):
        y = F.relu(self.conv(x))
        return y if scale is None else y * scale


def test_arguments_unlike_the_example_raise_rather_than_mislead():
    model, x = Switch().eval(), draw(1, 3, 4, 4)
    facts, fast = fused(model, x)
    assert facts == {"conv": "relu"}
    assert isinstance(fast.conv, SparseConv2d)
    with pytest.raises(AssertionError, match="specialized"):
        fast(x, torch.ones(1))
    facts, fast = fused(model, x, torch.full((1,), 3.0))
    assert facts == {"conv": "relu"}


def test_hooks_on_a_block_stay():
    model, x = Function(FUSED["relu"][0]), draw(5, 7)
    model.register_forward_hook(lambda module, args, output: output + 1)
    facts, _ = fused(model, x)
    assert facts == {"one": "", "two": ""}


def test_layers_that_stay_dense_are_not_touched():
    model, x = Function(FUSED["add"][0]).eval(), draw(5, 7)
    fast = compile(model, x, choose=lambda layer: "dense")
    assert type(fast) is Function
    assert [row.fused for row in fast.plan.rows] == ["", ""]

"""Batch norms folded and activations fused: where it is right, and where it would not be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunus.runtime import SparseConv2d, SparseLinear, compile
from prunus.runtime.candidates import record
from prunus.runtime.fuse import Chain, chains, folded


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def settled(model):
    """Random weights with zeros, and norms with statistics and scales of their own; eval mode."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module._buffers.items()]:
            if tensor is not None and tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                positive = "var" in name or (tensor.dim() == 1 and name == "weight")
                tensor.data.copy_(drawn.abs() + 0.5 if positive else drawn)
                if tensor.dim() > 1:
                    tensor.data.mul_(torch.rand(tensor.shape, generator=generator) > 0.5)
    return model.eval()


def found(model, example):
    return chains(model, example, record(model, example))


def forced(layer):
    return "csr"


def assert_same(model, fast, x):
    wanted = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(fast(x).double(), wanted, rtol=1e-4, atol=1e-4)


class Block(nn.Module):
    """Residual, with one activation in two places, a functional one, and GELU on a linear layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.relu, self.gelu = nn.ReLU(), nn.GELU(approximate="tanh")
        self.head, self.tail = nn.Linear(4, 6), nn.Linear(6, 3)
        self.flat = nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.relu(self.norm(self.one(x)))
        y = self.relu(x + self.last(self.two(y)))
        return F.relu(self.tail(self.gelu(self.flat(self.head(y.mean((2, 3)))))))


class Optional(Block):
    """What comes between the layers depends on an argument that the example leaves out."""

    def forward(self, x, scale=None):
        y = self.one(x)
        y = y if scale is None else y * scale
        return self.norm(y)


def test_a_trace_finds_what_follows_each_layer():
    model, x = settled(Block()), draw(2, 4, 5, 6)
    assert found(model, x) == [
        Chain("one", "norm"),
        Chain("two", "last"),
        Chain("head", "flat", "gelu"),
    ]
    fast = compile(model, x, choose=forced)
    assert isinstance(fast.norm, nn.Identity)
    assert isinstance(fast.gelu, nn.Identity)
    assert fast.head.activation == "gelu_tanh"
    assert {row.name: row.fused for row in fast.plan.rows} == {
        "one": "batch norm, relu",
        "two": "batch norm, residual, relu",
        "head": "batch norm, gelu_tanh",
        "tail": "relu",
    }
    assert "with batch norm, gelu_tanh" in str(fast.plan)
    assert_same(model, fast, x)


def test_an_argument_that_the_example_leaves_out_may_come_between():
    model, x = settled(Optional()), draw(2, 4, 5, 6)
    fast = compile(model, x, choose=forced)
    assert isinstance(fast.norm, nn.BatchNorm2d)
    assert_same(model, fast, x)
    torch.testing.assert_close(fast(x, 2.0), model(x, 2.0), rtol=1e-4, atol=1e-4)


class Untraceable(nn.Module):
    """Its forward pass looks at values; the layers stand in a Sequential."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.SiLU(), "silu"), (nn.ReLU6(), "relu6")],
)
def test_neighbours_in_a_sequential_where_tracing_fails(activation, name):
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 2, 1), nn.Tanh())
    model, x = settled(Untraceable(*layers)), draw(2, 3, 6, 5)
    assert found(model, x) == [Chain("layers.0", "layers.1", "layers.2")]
    fast = compile(model, x, choose=forced)
    assert fast.layers[0].activation == name
    assert isinstance(fast.layers[2], nn.Identity)
    assert_same(model, fast, x)


def test_dense_layers_take_the_batch_norm_too():
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    x = draw(2, 3, 6, 5)
    fast = compile(model, x, choose=lambda layer: "dense")
    assert [type(m) for m in fast] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert fast.plan.rows[0].fused == "batch norm"
    assert_same(model, fast, x)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_folding_keeps_zeros_and_works_without_affine_and_bias():
    for affine, bias in ((True, False), (False, True)):
        layer = nn.Linear(7, 5, bias=bias)
        model = settled(nn.Sequential(layer, nn.BatchNorm1d(5, affine=affine)))
        twins = folded([Chain("0", "1")], model)
        assert torch.equal(twins["0"].weight == 0, layer.weight == 0)
        x = draw(4, 7)
        torch.testing.assert_close(twins["0"](x), model(x), rtol=1e-4, atol=1e-5)
        assert (layer.bias is not None) == bias


def two_readers():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    return Reads()


def called_twice():
    class Twice(two_readers().__class__):
        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))))

    return Twice()


def weight_read():
    class Peeks(two_readers().__class__):
        def forward(self, x):
            return self.norm(self.conv(x)) * self.conv.weight.sum()

    return Peeks()


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    return model


def shared():
    norm = nn.BatchNorm2d(3)
    return Untraceable(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)


def lying():
    """The Sequential is not called as a whole."""

    class Lies(Untraceable):
        def forward(self, x):
            y = self.layers[0](x) if x.sum() < 1e9 else x
            return self.layers[1](y * 2)

    return Lies(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


REFUSED = {
    "two readers": two_readers,
    "called twice": called_twice,
    "weight read": weight_read,
    "hooked": hooked,
    "shared": shared,
    "lying": lying,
    "no statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_left_alone(name):
    model, x = settled(REFUSED[name]()), draw(2, 3, 5, 4)
    wanted = model(x)
    fast = compile(model, x, choose=forced)
    assert any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    assert any(isinstance(m, SparseConv2d) for m in fast.modules())
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)


def test_an_activation_that_does_not_follow_is_not_fused():
    class Between(Untraceable):
        def forward(self, x):
            y = self.layers[0](x) if x.sum() < 1e9 else x
            return self.layers[1](y - 1)

    model, x = settled(Between(nn.Linear(6, 5), nn.ReLU())), draw(3, 6)
    fast = compile(model, x, choose=forced)
    assert isinstance(fast.layers[0], SparseLinear)
    assert fast.layers[0].activation == ""
    assert_same(model, fast, x)


def test_a_norm_over_another_axis_is_not_folded():
    model, x = settled(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))), draw(3, 5, 6)
    assert found(model, x) == []
    assert_same(model, compile(model, x, choose=forced), x)


def test_defaults_of_forward_are_those_of_the_call():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

        def forward(self, x, other=None):
            y = self.fc(x)
            if other is None:
                y = y * 2
            return self.norm(y)

    model, x = settled(Skips()), draw(3, 6)
    assert found(model, x) == []
    assert found(model, (x, torch.ones(5))) == [Chain("fc", "norm")]
    assert_same(model, compile(model, {"x": x}, choose=forced), x)


def test_a_layer_that_stays_dense_keeps_its_activation():
    model, x = settled(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), draw(3, 6)
    fast = compile(model, x, choose=lambda layer: "dense")
    assert [type(m) for m in fast] == [nn.Linear, nn.ReLU]
    assert fast.plan.rows[0].fused == ""

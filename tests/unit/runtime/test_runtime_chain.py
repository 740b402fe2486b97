"""Chains of sparse layers: the module, the operator, and the pass that finds them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from prunus.errors import ShapeError, ValueRangeError
from prunus.metrics import flops
from prunus.runtime import SparseLinear, chain, compile
from prunus.runtime.chain import SparseChain


def pruned(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data *= torch.rand(layer.weight.shape) > 0.8
    return layer.requires_grad_(False)


class Block(nn.Module):
    """A transformer's feed-forward block; `peek` also returns what lies between its layers."""

    def __init__(self, peek: bool = False) -> None:
        super().__init__()
        self.up, self.act, self.down = pruned(40, 100), nn.GELU(), pruned(100, 40, 1)
        self.peek = peek

    def forward(self, x: Tensor):
        """The residual block."""
        hidden = self.act(self.up(x))
        out = x + self.down(hidden)
        return (out, hidden.sum()) if self.peek else out


def layers() -> list[SparseLinear]:
    first = SparseLinear.from_dense(pruned(30, 50)).with_activation("gelu")
    return [first, SparseLinear.from_dense(pruned(50, 20, 1, bias=False), "tiled_f32")]


def one_by_one(x: Tensor, residual: Tensor | None = None) -> Tensor:
    first, second = layers()
    return second(first(x), residual)


def test_a_chain_computes_what_its_layers_do():
    module, x = SparseChain(layers()), torch.randn(3, 7, 30)
    residual = torch.randn(3, 7, 20)
    torch.testing.assert_close(module(x), one_by_one(x), rtol=1e-5, atol=1e-5)
    wanted = one_by_one(x, residual)
    torch.testing.assert_close(module(x, residual), wanted, rtol=1e-5, atol=1e-5)
    broadcast = torch.randn(20)
    wanted = one_by_one(x) + broadcast
    torch.testing.assert_close(module(x, broadcast), wanted, rtol=1e-5, atol=1e-5)
    assert module(torch.zeros(0, 30)).shape == (0, 20)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ShapeError, match="input has shape"):
        module(torch.zeros(3, 29))


def test_gradients_copies_and_compilation():
    module, x = SparseChain(layers()), torch.randn(5, 30)
    leaf = x.clone().requires_grad_(True)
    module(leaf).sum().backward()
    other = x.clone().requires_grad_(True)
    one_by_one(other).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    wanted = module(x)
    torch.testing.assert_close(copy.deepcopy(module)(x), wanted)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = SparseChain(layers())
    twin.load_state_dict(torch.load(file))
    torch.testing.assert_close(twin(x), wanted)
    exported = torch.export.export(module, (x,))
    assert any("sparse_chain" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), wanted)


def test_the_operator_passes_torch_s_checks_and_refuses():
    module, x = SparseChain(layers()), torch.randn(5, 30)
    packed, biases = [layer.packed for layer in module.layers], [module.layers[0].bias, None]
    arguments = (x, packed, biases, 20, ["gelu", ""], torch.randn(5, 20))
    torch.library.opcheck(torch.ops.prunus.sparse_chain.default, arguments)
    call = torch.ops.prunus.sparse_chain
    with pytest.raises(ShapeError, match="chain"):
        call(x[:, :29], packed, biases, 20, ["", ""])
    with pytest.raises(ShapeError, match="bias"):
        call(x, packed, [torch.zeros(3), None], 20, ["", ""])
    with pytest.raises(ShapeError, match="residual"):
        call(x, packed, biases, 20, ["", ""], x)
    with pytest.raises(ValueRangeError, match="float32"):
        call(x.double(), packed, biases, 20, ["", ""])
    with pytest.raises(ValueRangeError, match="two or more"):
        SparseChain(layers()[:1])
    with pytest.raises(ShapeError, match="fit"):
        SparseChain(layers()[::-1])


@pytest.fixture
def always(monkeypatch):
    """Chains win and so do sparse layers, whatever the clock says."""
    monkeypatch.setattr(chain, "_faster", lambda *_: True)

    def timed(runs, **_):
        return {name: 1.0 if "dense" in name or "channels" in name else 0.1 for name in runs}

    for module in ("decide", "whole"):
        monkeypatch.setattr(f"prunus.runtime.{module}.interleaved", timed)


def test_compile_chains_neighbours(always, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(2, 9, 40)
    fast = compile(model, x)
    assert fast.plan.chained == (("0.up", "0.down"), ("1.up", "1.down"))
    assert fast.plan.to_dict()["chained"] == [["0.up", "0.down"], ["1.up", "1.down"]]
    assert "2 chains" in str(fast.plan)
    assert isinstance(fast[0].up, nn.Identity)
    assert isinstance(fast[0].down, SparseChain)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    counted, wanted = flops(fast, x), flops(model, x)
    assert (counted.dense, counted.sparse) == (wanted.dense, wanted.sparse)
    again = compile(model, x, choose=fast.plan.choose)
    assert again.plan.chained == fast.plan.chained
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
    assert compile(model, x, choose=lambda layer: "csr").plan.chained == ()


def test_what_others_read_is_not_chained(always, monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    model, x = Block(peek=True).eval(), torch.randn(4, 40)
    fast = compile(model, x)
    assert fast.plan.chained == ()
    for found, wanted in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

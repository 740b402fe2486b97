"""The operators under autograd, opcheck, torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.runtime import SparseConv2d, SparseLinear
from prunus.runtime.weight import pack_weight

LINEAR = torch.ops.prunus.sparse_linear
CONV = torch.ops.prunus.sparse_conv2d
ACTIVATIONS = {
    "": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse_weight(rows=9, columns=13):
    weight = draw(rows, columns)
    return weight * (draw(rows, columns, seed=1) > 0.5)


def leaf(tensor):
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(13,), (4, 13), (2, 3, 13)])
def test_linear_and_its_gradients_are_those_of_the_dense_product(shape, biased, activation):
    weight = sparse_weight()
    packed, x, bias = pack_weight(weight), leaf(draw(*shape)), leaf(draw(9)) if biased else None
    y = LINEAR(x, packed, bias, 9, activation)
    x64 = leaf(x.detach().double())
    bias64 = leaf(bias.detach().double()) if biased else None
    wanted = ACTIVATIONS[activation](F.linear(x64, weight.double(), bias64))
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    upstream = draw(*y.shape, seed=2)
    y.backward(upstream)
    wanted.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    if biased:
        torch.testing.assert_close(bias.grad.double(), bias64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_and_its_gradients_are_those_of_the_dense_one(groups, activation):
    weight = draw(6, 4 // groups, 3, 2)
    weight = weight * (draw(*weight.shape, seed=1) > 0.3)
    packed, x, bias = pack_weight(weight), leaf(draw(2, 4, 7, 9)), leaf(draw(6))
    y = CONV(x, packed, bias, 6, [3, 2], [2, 1], [1, 2, 0, 3], [1, 2], groups, activation)
    x64, bias64 = leaf(x.detach().double()), leaf(bias.detach().double())
    padded = F.pad(x64, (0, 3, 1, 2))
    wanted = F.conv2d(padded, weight.double(), bias64, (2, 1), 0, (1, 2), groups)
    wanted = ACTIVATIONS[activation](wanted)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    upstream = draw(*y.shape, seed=2)
    y.backward(upstream)
    wanted.backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad.double(), bias64.grad, rtol=1e-5, atol=1e-5)


MOVES = ([3, 3], [2, 1], [1, 1, 0, 2], [1, 1], 1)


def test_opcheck_passes():
    packed, filters = pack_weight(sparse_weight()), pack_weight(sparse_weight(5, 18))
    for activation in ("", "relu", "silu"):
        torch.library.opcheck(LINEAR, (leaf(draw(2, 3, 13)), packed, leaf(draw(9)), 9, activation))
        operands = (leaf(draw(2, 2, 6, 5)), filters, leaf(draw(5)), 5, *MOVES, activation)
        torch.library.opcheck(CONV, operands)
    torch.library.opcheck(LINEAR, (draw(4, 13).T.contiguous().T, packed, None, 9, ""))
    torch.library.opcheck(torch.ops.prunus.sparse_linear_grad, (draw(4, 9), packed, 13))
    torch.library.opcheck(
        torch.ops.prunus.sparse_conv2d_grad, (draw(2, 5, 3, 5), filters, [2, 2, 6, 5], *MOVES)
    )


def test_operators_refuse_what_a_kernel_could_not_read():
    packed, x = pack_weight(sparse_weight()), draw(2, 13)
    with pytest.raises(ShapeError, match=r"9x13, asked for 8x13"):
        LINEAR(x, packed, None, 8, "")
    with pytest.raises(ShapeError, match="9x13, asked for 9x12"):
        LINEAR(draw(2, 12), packed, None, 9, "")
    with pytest.raises(ShapeError, match="bias"):
        LINEAR(x, packed, draw(8), 9, "")
    with pytest.raises(ValueRangeError, match="float64"):
        LINEAR(x.double(), packed, None, 9, "")
    with pytest.raises(ValueRangeError, match="uint8"):
        LINEAR(x, packed.float(), None, 9, "")
    with pytest.raises(FormatError):
        LINEAR(x, packed[:-64], None, 9, "")
    with pytest.raises(ValueRangeError, match="'swish'"):
        LINEAR(x, packed, None, 9, "swish")
    with pytest.raises(ShapeError, match="batch, channels"):
        CONV(x, packed, None, 9, *MOVES, "")
    with pytest.raises(ShapeError, match="9x13, asked for 9x18"):
        CONV(draw(1, 2, 6, 6), packed, None, 9, *MOVES, "")
    with pytest.raises(ShapeError, match="groups"):
        CONV(draw(1, 4, 6, 6), packed, None, 9, *MOVES[:-1], 2, "")


def network():
    """Packed layers of every kind in one model, and its input."""
    torch.manual_seed(0)
    dense = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 1, stride=2), nn.Linear(54, 5)]
    for module in dense:
        module.weight.data.mul_(torch.rand_like(module.weight) > 0.5)
    model = nn.Sequential(
        SparseConv2d.from_dense(dense[0]),
        nn.ReLU(),
        SparseConv2d.from_dense(dense[1]),
        nn.Flatten(),
        SparseLinear.from_dense(dense[2]),
    )
    return model.eval(), draw(2, 3, 6, 6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_takes_the_whole_model_as_one_graph(backend):
    model, x = network()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x))


def test_torch_compile_takes_dynamic_batches_and_gradients():
    model, _ = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (1, 3, 5):
        one, other = leaf(draw(batch, 3, 6, 6)), leaf(draw(batch, 3, 6, 6))
        compiled(one).sum().backward()
        model(other).sum().backward()
        torch.testing.assert_close(one.grad, other.grad)


# Inductor itself uses functions that torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_inductor_compiles_the_model():
    model, x = network()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_holds_the_operators(strict):
    model, x = network()
    program = torch.export.export(model, (x,), strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("prunus.sparse_linear" in name for name in names) == 1
    assert sum("prunus.sparse_conv2d" in name for name in names) == 2
    torch.testing.assert_close(program.module()(x), model(x))


def test_an_exported_program_survives_a_file(tmp_path):
    model, x = network()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    other = draw(5, 3, 6, 6)
    torch.testing.assert_close(loaded(other), model(other))


def test_gradients_flow_through_the_modules_to_the_input():
    model, x = network()
    dense = nn.Sequential(*(m.to_dense() if hasattr(m, "to_dense") else m for m in model))
    one, other = leaf(x), leaf(x)
    model(one).square().sum().backward()
    dense(other).square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_tracers_see_the_operators():
    model, x = network()
    graph = make_fx(model)(x)
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("prunus" in name for name in names) == 3
    other = draw(2, 3, 6, 6, seed=5)
    torch.testing.assert_close(graph(other), model(other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_jit_trace_computes_other_inputs():
    layer = network()[0][4]
    traced = torch.jit.trace(layer, draw(2, 54))
    other = draw(2, 54, seed=5)
    assert torch.equal(traced(other), layer(other))

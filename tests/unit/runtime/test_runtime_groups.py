from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError
from prunus.runtime import candidates
from prunus.runtime.groups import grouped_layer, grouping_of


def structured(structure, sparsity=0.8, shape=(96, 64)):
    layer = nn.Linear(shape[1], shape[0]).eval()
    pr.prune(nn.Sequential(layer), pr.methods.one_shot_magnitude(sparsity, structure=structure))
    return layer


@pytest.mark.parametrize("structure", [pr.structures.vector(16), pr.structures.block(8, 2)])
def test_a_structured_layer_computes_what_the_dense_one_does(structure):
    layer = structured(structure)
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    wanted = layer(x)
    packed = grouped_layer(layer)
    torch.testing.assert_close(packed(x), wanted, rtol=1e-5, atol=1e-5)
    half = grouped_layer(layer, torch.bfloat16)
    torch.testing.assert_close(half(x), wanted, rtol=2e-2, atol=2e-2)
    assert half.packed.numel() < packed.packed.numel()
    assert packed.sparsity == pytest.approx(float((layer.weight == 0).float().mean()))
    back = packed.to_dense()
    assert torch.equal(back.weight, layer.weight)


def test_gradients_and_state_dicts_pass_through():
    packed = grouped_layer(structured(pr.structures.vector(8)))
    x = torch.randn(3, 64, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    expected = packed.weight.sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    other = grouped_layer(structured(pr.structures.vector(8)))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))


def test_what_has_no_groups_says_so():
    layer = structured(pr.structures.element(), 0.9)
    assert grouping_of(layer) is None
    assert grouping_of(nn.Conv2d(3, 4, 3)) is None
    with pytest.raises(ShapeError, match="SparseLinear"):
        grouped_layer(layer)


@pytest.mark.parametrize("structure", [pr.structures.vector(16), pr.structures.n_of_m(2, 4)])
def test_compile_offers_groups_from_the_zeros_alone(structure):
    model = nn.Sequential(structured(structure, 0.5, (64, 64)), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(33, 64)
    fast = pr.compile(model, x, choose=lambda layer: "groups" if layer.sparsity else "dense")
    assert [row.choice for row in fast.plan.rows] == ["groups", "dense"]
    assert kernels.info(fast[0].packed.numpy()).kind == "vectors_f32"
    assert fast[0].activation == "relu"
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    measured = pr.compile(model, x, threads=1)
    first = measured.plan.rows[0]
    ways = candidates.ways_of(candidates.layer_of("0", model[0]), model[0], torch.float32)
    assert "groups" in ways
    assert first.choice in (*ways, "dense")


def test_groups_are_refused_where_there_are_none(tmp_path):
    model = nn.Sequential(structured(pr.structures.element(), 0.9))
    with pytest.raises(ValueRangeError, match="groups"):
        pr.compile(model, torch.randn(3, 64), choose=lambda layer: "groups")


def test_a_compiled_model_in_groups_is_saved_and_loaded(tmp_path):
    model = nn.Sequential(structured(pr.structures.vector(8))).eval()
    x = torch.randn(9, 64)
    fast = pr.compile(model, x, choose=lambda layer: "groups")
    pr.save(fast, tmp_path / "fast")
    other = pr.compile(
        nn.Sequential(structured(pr.structures.vector(8))), x, choose=fast.plan.choose
    )
    pr.load(tmp_path / "fast", other)
    assert torch.equal(other(x), fast(x))

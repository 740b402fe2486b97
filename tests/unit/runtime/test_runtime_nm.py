from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.runtime import candidates
from prunus.runtime.nm import nm_layer, suits_nm


def structured(n, m, shape=(96, 64)):
    torch.manual_seed(n * m)
    layer = nn.Linear(shape[1], shape[0]).eval()
    structure = pr.structures.n_of_m(n, m)
    pr.prune(nn.Sequential(layer), pr.methods.one_shot_magnitude(1 - n / m, structure=structure))
    return layer


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_an_n_of_m_layer_computes_what_the_dense_one_does(n, m):
    layer = structured(n, m)
    assert suits_nm(layer)
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    packed, half = nm_layer(layer), nm_layer(layer, torch.bfloat16)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half(x), layer(x), rtol=2e-2, atol=2e-2)
    assert half.packed.numel() < packed.packed.numel() < layer.weight.numel() * 4
    assert packed.sparsity == pytest.approx(1 - n / m)
    assert torch.equal(packed.to_dense().weight, layer.weight)


def test_gradients_and_state_dicts_pass_through():
    packed = nm_layer(structured(2, 4))
    x = torch.randn(3, 64, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
    other = nm_layer(structured(2, 4))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))
    broken = {name: value.clone() for name, value in packed.state_dict().items()}
    broken["packed"][64:72] = 255
    with pytest.raises((FormatError, RuntimeError), match="columns of a window"):
        other.load_state_dict(broken)


def test_what_is_not_n_of_m_says_so():
    layer = nn.Linear(64, 96)
    assert not suits_nm(layer)
    assert not suits_nm(nn.Conv2d(3, 4, 3))
    with pytest.raises(ShapeError, match="16 of 16"):
        nm_layer(layer)
    with pytest.raises(ShapeError, match="Conv2d"):
        nm_layer(nn.Conv2d(3, 4, 3))
    pr.prune(nn.Sequential(layer), pr.methods.one_shot_magnitude(0.9))
    assert not suits_nm(layer)  # its fullest window has many more than the others
    with pytest.raises(ValueRangeError, match="n:m"):
        pr.compile(nn.Sequential(layer), torch.randn(3, 64), choose=lambda layer: "n:m")


@pytest.mark.parametrize("word", ["n:m", "n:m bf16"])
def test_compile_takes_it_by_name_fuses_saves_and_loads(word, tmp_path):
    model = nn.Sequential(structured(2, 4), nn.ReLU(), nn.Linear(96, 8)).eval()
    x = torch.randn(33, 64)
    fast = pr.compile(
        model, x, dtype=torch.bfloat16, choose=lambda layer: word if layer.sparsity else "dense"
    )
    assert [row.choice for row in fast.plan.rows] == [word, "dense"]
    kind = kernels.info(fast[0].packed.numpy()).kind
    assert kind == ("nm_f32" if word == "n:m" else "nm_bf16")
    assert fast[0].activation == "relu"
    close = {"rtol": 1e-4, "atol": 1e-5} if word == "n:m" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(fast(x), model(x), **close)
    pr.save(fast, tmp_path / "fast")
    again = pr.compile(model, x, dtype=torch.bfloat16, choose=fast.plan.choose)
    pr.load(tmp_path / "fast", again)
    assert torch.equal(again(x), fast(x))


def test_the_planner_offers_it_in_the_allowed_precision_only():
    layer = structured(2, 4)
    facts = candidates.layer_of("0", layer)
    assert "n:m" in candidates.ways_of(facts, layer, torch.float32)
    assert "n:m bf16" not in candidates.ways_of(facts, layer, torch.float32)
    assert "n:m bf16" in candidates.ways_of(facts, layer, torch.bfloat16)
    measured = pr.compile(nn.Sequential(layer), torch.randn(64, 64), threads=1)
    assert measured.plan.rows[0].choice in (
        *candidates.ways_of(facts, layer, torch.float32),
        "dense",
    )

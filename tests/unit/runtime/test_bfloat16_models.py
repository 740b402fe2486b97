"""Models in bfloat16: their layers are packed, judged against torch's own bfloat16, and close."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import prunus as pr
from prunus.runtime import PackedWeight, compile, decide, whole

# Half the distance of two bfloat16 values near 1, and what a product of fp32 may be off by, twice.
ROUNDING, PRODUCT = 2.0**-8, 2.0**-22


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Packed ways take half the time of dense ones."""

    def fake(runs, *, budget):
        return {name: 2.0 if name.startswith("dense") else 1.0 for name in runs}

    monkeypatch.setattr(decide, "interleaved", fake)
    monkeypatch.setattr(whole, "interleaved", fake)
    monkeypatch.setenv("PRUNUS_CACHE", "")


def pruned(model, sparsity=0.8):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) >= sparsity
    return model.eval().bfloat16()


def bound(layer, x, exact):
    """What a sum in fp32 and one rounding to bfloat16 may be off by."""
    wide = copy.deepcopy(layer).double()
    for parameter in wide.parameters():
        parameter.data.abs_()
    with torch.no_grad():
        return ROUNDING * exact.abs() + PRODUCT * wide(x.double().abs())


LAYERS = [
    (nn.Linear(70, 33), torch.randn(5, 70), "csr"),
    (nn.Linear(70, 33), torch.randn(40, 70), "tiled"),
    (nn.Linear(70, 33), torch.randn(1, 70), "bitmap bf16"),
    (nn.Linear(70, 33, bias=False), torch.randn(2, 3, 70), "bitmap"),
    (nn.Conv1d(6, 9, 3), torch.randn(2, 6, 17), "csr"),
    (nn.Conv2d(6, 9, 3, padding=1), torch.randn(2, 6, 8, 9), "csr"),
]


@pytest.mark.parametrize(("layer", "x", "way"), LAYERS)
def test_layers_in_bfloat16_are_packed_without_loss(layer, x, way):
    model, x = nn.Sequential(pruned(layer)), x.bfloat16()
    fast = compile(model, x, choose=lambda layer: way)
    assert fast.plan.rows[0].choice == way
    assert isinstance(fast[0], PackedWeight)
    assert torch.equal(fast[0].weight, model[0].weight)  # of the same dtype, too
    y = fast(x)
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    assert ((y.double() - exact).abs() <= bound(model[0], x, exact)).all()
    again = fast[0].to_dense()
    assert again.weight.dtype == torch.bfloat16
    assert torch.allclose(again(x).float(), y.float(), rtol=2 * ROUNDING, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_rival_is_torch_in_bfloat16(dtype):
    seen = []
    model = pruned(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)))
    fast = compile(model, torch.randn(4, 64).bfloat16(), dtype=dtype, choose=None)
    assert fast.plan.sparse_layers == ("0", "2")
    assert fast.plan.dtype == "bfloat16"
    assert "dense bf16" not in str(fast.plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "interleaved", lambda runs, *, budget: seen.append(runs) or {})
        with pytest.raises(KeyError):
            compile(model, torch.randn(4, 64).bfloat16(), dtype=dtype)
    assert "dense bf16" not in seen[0]
    assert {"csr", "bitmap bf16"} <= set(seen[0])
    # The dense rival takes and gives bfloat16.
    assert seen[0]["dense"]().dtype == seen[0]["csr"]().dtype == torch.bfloat16


def test_slower_than_torch_in_bfloat16_stays_dense(monkeypatch):
    times = {"dense": 1.0, "dense 0": 1.0}
    fake = lambda runs, *, budget: {name: times.get(name, 1.04) for name in runs}  # noqa: E731
    monkeypatch.setattr(decide, "interleaved", fake)
    monkeypatch.setattr(whole, "interleaved", fake)
    model = pruned(nn.Sequential(nn.Linear(64, 48)))
    fast = compile(model, torch.randn(4, 64).bfloat16())
    assert fast.plan.sparse_layers == ()
    assert type(fast[0]) is nn.Linear


class Residual(nn.Module):
    """A residual block with an activation."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return torch.relu(self.two(nn.functional.gelu(self.one(x))) + x)


def test_residuals_and_activations_are_fused_in_bfloat16():
    model, x = pruned(nn.Sequential(Residual(), nn.LayerNorm(64))), torch.randn(9, 64).bfloat16()
    fast = compile(model, x, choose=lambda layer: "csr")
    assert [row.fused for row in fast.plan.rows] == ["gelu", "residual, relu"]
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        ours, torchs = ((f(x).double() - exact).abs().max() for f in (fast, model))
    assert fast(x).dtype == torch.bfloat16
    assert ours <= torchs + ROUNDING * exact.abs().max()


def test_batch_norms_fold_and_copies_compute_the_same():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model[1].running_var.uniform_(0.5, 2.0)
    model, x = pruned(model), torch.randn(2, 3, 9, 9).bfloat16()
    fast = compile(model, x, choose=lambda layer: "csr")
    assert fast.plan.rows[0].fused == "batch norm, relu"
    wanted = fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), wanted)
        assert twin[0].weight.dtype == torch.bfloat16


def test_mixed_dtypes_are_refused_with_the_reason():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)

    model = Cast().eval()
    model.layer.weight.data[:14] = 0
    row = compile(model, torch.randn(2, 16).bfloat16()).plan.rows[0]
    assert (row.choice, row.reason) == ("dense", "its input is torch.bfloat16")
    half = nn.Sequential(nn.Linear(16, 16)).half().eval()
    half[0].weight.data[:14] = 0
    row = compile(half, torch.randn(2, 16).half()).plan.rows[0]
    assert row.choice == "dense"
    assert "float16" in row.reason


def test_a_file_of_a_compiled_model_in_bfloat16_fills_its_twin(tmp_path):
    model = pruned(nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9)))
    x = torch.randn(5, 70).bfloat16()
    fast = compile(model, x, choose=lambda layer: "csr")
    pr.save(fast, tmp_path / "half.prunus")
    again = copy.deepcopy(fast)
    again[0].packed.zero_()
    again[2].bias.zero_()
    pr.load(tmp_path / "half.prunus", again)
    assert torch.equal(again(x), fast(x))
    assert again[0].weight.dtype == torch.bfloat16

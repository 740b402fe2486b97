"""Attention and layer norms of compiled models: the operator, its planner, what stays working."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError
from prunus.metrics import flops
from prunus.runtime import compile, decide, load, save, transformer
from prunus.runtime.attention import LayerNorm, attend

pytestmark = pytest.mark.skipif(kernels.attention_ptr is None, reason="no native module")


class Block(nn.Module):
    """An encoder layer; torch.fx cannot trace it if it looks at values."""

    def __init__(self, traceable: bool = True, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.traceable = heads, traceable
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.traceable and x.sum() == 12345:
            return x
        batch, length, width = x.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.norm(self.output(mixed.transpose(1, 2).reshape(batch, length, width)) + x)


class Model(nn.Module):
    def __init__(self, traceable: bool = True) -> None:
        super().__init__()
        self.one, self.two = Block(traceable), Block(traceable)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        given = () if mask is None else (mask,)
        return self.two(self.one(x, *given), *given)


def pruned(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
        if parameter.dim() > 1:
            parameter.data *= (torch.rand_like(parameter) > 0.7) * 0.3
    return module.eval().requires_grad_(False)


@pytest.fixture
def always(monkeypatch, tmp_path):
    """Whatever is not torch's wins, whatever the clock says."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))

    def timed(runs, **_):
        slow = ("dense", "channels", "torch", "apart")
        times = {name: 1.0 if name.startswith(slow) else 0.1 for name in runs}
        return {name: seconds / (1 + ("merged" in name)) for name, seconds in times.items()}

    for module in ("decide", "whole"):
        monkeypatch.setattr(f"prunus.runtime.{module}.interleaved", timed)


@pytest.fixture
def counted(monkeypatch):
    """Calls of the attention kernel."""
    calls = []
    kept = kernels.attention_ptr

    def pointers(*args):
        calls.append(args)
        return kept(*args)

    monkeypatch.setattr(kernels, "attention_ptr", pointers)
    return calls


@pytest.mark.parametrize("traceable", [True, False])
def test_compile_places_attention_and_norms(always, counted, traceable):
    model, x = pruned(Model(traceable)), torch.randn(2, 9, 32)
    fast = compile(model, x)
    assert fast.plan.attentions == ("one", "two")
    assert fast.plan.norms == ("one.norm", "two.norm")
    assert "2 attentions, 2 layer norms" in str(fast.plan)
    assert fast.plan.to_dict()["norms"] == ["one.norm", "two.norm"]
    assert len(fast.plan.merged) == 2
    one, other = flops(fast, x), flops(model, x)
    assert (one.dense, one.sparse) == (other.dense, other.sparse)
    counted.clear()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(counted) == 2
    assert type(model.one.norm) is nn.LayerNorm
    assert fast.one.norm.weight.data_ptr() != model.one.norm.weight.data_ptr()
    again = compile(model, x, choose=fast.plan.choose)
    assert (again.plan.attentions, again.plan.norms) == (fast.plan.attentions, fast.plan.norms)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
    assert compile(model, x, choose=lambda layer: "csr").plan.attentions == ()


class Odd(nn.Module):
    """Attention whose views differ from block to block."""

    def __init__(self, split, join, reads=False) -> None:
        super().__init__()
        self.split, self.join, self.reads = split, join, reads
        self.layer = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(self.layer(x))
        mixed = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.4)
        out = self.join(mixed, x)
        return out + mixed.sum() if self.reads else out


VIEWS = {
    "unflatten": (
        lambda x: x.unflatten(-1, (3, -1)).transpose(1, 2),
        lambda y, x: y.transpose(1, 2).flatten(2),
    ),
    "view": (
        lambda x: x.view(x.shape[0], -1, 3, 8).permute(0, 2, 1, 3),
        lambda y, x: y.permute(0, 2, 1, 3).contiguous().view(x.shape[0], -1, 24),
    ),
    "reshape": (
        lambda x: x.reshape(x.size(0), x.size(1), 3, 8).transpose(2, 1),
        lambda y, x: y.transpose(-2, -3).reshape(x.size(0), x.size(1), 24),
    ),
}


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_views_around_attention_go_where_nothing_else_reads_them(always, counted, name, reads):
    model, x = pruned(Odd(*VIEWS[name], reads)), torch.randn(2, 9, 24)
    fast = compile(model, x)
    assert fast.plan.attentions == ("",)
    assert ("attend_tokens" in fast.prunus_forward.source) is not reads
    counted.clear()
    for size in (9, 17, 3):
        x = torch.randn(3, size, 24)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert len(counted) == 2
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(leaf).square().sum().backward()
    model(other).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_fixed_sizes_and_other_views_stay(always):
    views = (lambda x: x.view(2, 9, 3, 8).transpose(1, 2), VIEWS["unflatten"][1])
    model, x = pruned(Odd(*views)), torch.randn(2, 9, 24)
    fast = compile(model, x)
    assert "attend_tokens" not in fast.prunus_forward.source
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="shape"):
        fast(torch.randn(4, 9, 24))


def test_never_slower(always, monkeypatch):
    model, x = pruned(Model()), torch.randn(2, 9, 32)
    real = decide.interleaved

    def equal(runs, **named):
        return dict.fromkeys(runs, 1.0) if transformer.KERNEL in runs else real(runs, **named)

    monkeypatch.setattr(decide, "interleaved", equal)
    plan = compile(model, x).plan
    assert (plan.attentions, plan.norms) == ((), ())


@pytest.mark.parametrize("traceable", [True, False])
def test_masks_other_sizes_and_copies(always, counted, traceable):
    model = pruned(Model(traceable))
    x, mask = torch.randn(2, 9, 32), torch.rand(2, 1, 9, 9) > 0.3
    fast = compile(model, (x, mask))
    assert fast.plan.attentions == ("one", "two")
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    for form in (fast, copy.deepcopy(fast), again):
        counted.clear()
        for size in (9, 30, 1):
            x, mask = torch.randn(1, size, 32), torch.rand(size, size) > 0.3
            torch.testing.assert_close(form(x, mask), model(x, mask), rtol=1e-4, atol=1e-4)
        assert len(counted) == 4  # torch's operator serves a single token


def test_save_and_load(always, tmp_path):
    model, x = pruned(Model()), torch.randn(2, 9, 32)
    fast = compile(model, x)
    save(fast, tmp_path / "model.prunus")
    empty = compile(pruned(Model()), x)
    for parameter in empty.parameters():
        parameter.zero_()
    load(tmp_path / "model.prunus", empty)
    torch.testing.assert_close(empty(x), fast(x), rtol=0, atol=0)


def test_export_and_torch_compile(always):
    model, x = pruned(Model()), torch.randn(2, 9, 32)
    fast = compile(model, x)
    exported = torch.export.export(fast, (x,))
    assert "prunus.attention" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-4)
    lazy = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(lazy(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_gradients_and_half_precision_go_to_torch(always, counted):
    model, x = pruned(Model()), torch.randn(2, 9, 32)
    fast = compile(model, x)
    counted.clear()
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(leaf).square().sum().backward()
    model(other).square().sum().backward()
    assert not counted
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-3, atol=1e-3)
    q = torch.randn(1, 2, 9, 8).bfloat16()
    torch.testing.assert_close(attend(q, q, q), F.scaled_dot_product_attention(q, q, q))
    norm = nn.LayerNorm(8).requires_grad_(False)
    torch.testing.assert_close(LayerNorm.of(norm)(q.float()), norm(q.float()))
    assert LayerNorm.of(norm.bfloat16())(q).dtype == torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["none", "bool", "added", "causal"]),
    st.integers(0, 2**31),
)
def test_attend_is_torchs(sizes, rows, columns, kind, seed):
    (batch, groups, shared), (queries, keys) = sizes, rows
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, groups * shared, queries, columns[0], generator=draw)
    k = torch.randn(batch, keys, groups, columns[0], generator=draw).transpose(1, 2)
    v = torch.randn(batch, keys, groups, columns[1], generator=draw).transpose(1, 2)
    mask = torch.randn(queries, keys, generator=draw)
    mask = {"bool": mask > 0, "added": mask}.get(kind)
    options = {"is_causal": kind == "causal", "enable_gqa": True, "attn_mask": mask}
    wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **{
        **options, "attn_mask": mask.double() if kind == "added" else mask
    })  # fmt: skip
    torch.testing.assert_close(attend(q, k, v, **options).double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_operator():
    q, k, v = (torch.randn(2, 3, 10, 8) for _ in range(3))
    call = torch.ops.prunus.attention
    torch.library.opcheck(call, (q, k, v, torch.rand(10, 10) > 0.5, False, 0.3))
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(call(q, k, v, None, False, 0.3), wanted)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(call(turned, k, v, None, False, 0.3), wanted)
    torch.testing.assert_close(attend(turned, k, v, scale=0.3).transpose(1, 2), wanted)
    assert call(q, k[:, :, :0], v[:, :, :0], None, False, 1.0).shape == (2, 10, 3, 8)
    with pytest.raises(ShapeError, match="fit"):
        call(q, k[:, :2], v, None, False, 1.0)
    with pytest.raises(ShapeError, match="mask"):
        call(q, k, v, torch.zeros(3, 3), False, 1.0)
    with pytest.raises(ValueRangeError, match="float32"):
        call(q.double(), k, v, None, False, 1.0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_layer_norm_keeps_the_dtype_of_its_input(default):
    norm = LayerNorm.of(nn.LayerNorm(24))
    x = torch.randn(5, 24)
    wanted = F.layer_norm(x, (24,))
    torch.set_default_dtype(default)
    try:
        y = norm(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y, wanted)


def test_layer_norm_of_nothing():
    norm = LayerNorm.of(nn.LayerNorm(24))
    assert norm(torch.empty(0, 24)).shape == (0, 24)
    assert LayerNorm.of(nn.LayerNorm(0))(torch.empty(3, 0)).shape == (3, 0)

"""A compiled model equals the original on ways that its example did not take."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

import prunus as pr
from prunus.errors import ValueRangeError
from prunus.runtime import SparseConv2d, SparseLinear
from prunus.runtime.dense import in_bfloat16


@pytest.fixture(autouse=True)
def _sparse_always_wins(monkeypatch, tmp_path):
    """All that may be packed, chained or fused is, so that nothing hides behind the clock."""
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    slow = ("dense", "channels", "torch", "apart")

    def timed(runs, **_):
        times = {name: 1.0 if name.startswith(slow) else 0.1 for name in runs}
        return {name: seconds / (1 + ("merged" in name)) for name, seconds in times.items()}

    for module in ("decide", "whole"):
        monkeypatch.setattr(f"prunus.runtime.{module}.interleaved", timed)


def fast(model: nn.Module, example: object) -> Any:
    """Compiled, and sparse."""
    compiled = pr.compile(model, example)
    assert any(isinstance(part, SparseLinear | SparseConv2d) for part in compiled.modules())
    return compiled


def pruned(model: nn.Module) -> Any:
    torch.manual_seed(0)
    pr.prune(model, pr.methods.random_pruning(0.95))
    return model.eval()


class Two(nn.Module):
    def __init__(self, width: int = 64, inside: int = 64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.act = nn.Linear(width, inside), nn.Linear(inside, width), nn.GELU()


class Distribution(Two):
    def forward(self, x: Tensor) -> Normal:
        h = self.a(x)
        return Normal(h, F.softplus(self.b(h)) + 0.1)


class Namespace(Two):
    def forward(self, x: Tensor) -> types.SimpleNamespace:
        h = self.a(x)
        return types.SimpleNamespace(h=h, y=self.b(h))


class Tall(Two):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if x.shape[0] > 100:
            h = h.clamp(min=0)
        return self.b(h)


class Flagged(Two):
    def forward(self, x: Tensor, hidden: bool = False):
        h = self.act(self.a(x))
        return (self.b(h), h) if hidden else self.b(h)


class Early(Two):
    def forward(self, x: Tensor, pre: bool = False) -> Tensor:
        h = self.a(x)
        y = self.act(h)
        return h if pre else self.b(y)


class Filled(Two):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h = self.a(x)
        h.masked_fill_(~keep[:, None], 0.0)
        return self.b(h)


class Features(Two):
    def features(self, x: Tensor) -> Tensor:
        return F.gelu(self.a(x)) + x

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.features(x))


class Inner(Two):
    def _features(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + x)

    def features(self, x: Tensor) -> Tensor:
        return self._features(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self._features(x))


class Counting(Two):
    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        return self.b(torch.relu(self.a(x)))


class Logging(Two):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x.sum())
        return self.b(torch.relu(self.a(x)))


class Gated(Two):
    gate: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return y * 2 if self.gate > 0 else y


class Scaled(Two):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) * self.alpha


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.bn.load_state_dict(
            self.bn.state_dict()
            | {"running_mean": torch.randn(16), "running_var": torch.rand(16) + 0.5}
        )

    def forward(self, x: Tensor, pre: bool = False) -> Tensor:
        h = self.conv(x)
        return h if pre else self.last(torch.relu(self.bn(h)))


def test_outputs_in_objects_are_compared():
    x = torch.randn(64, 64)
    model = pruned(Distribution())
    compiled = fast(model, x)
    torch.testing.assert_close(compiled(x).loc, model(x).loc, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x).scale, model(x).scale, rtol=1e-4, atol=1e-4)
    model = pruned(Namespace(64, 32))
    torch.testing.assert_close(fast(model, x)(x).h, model(x).h, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Tall, Flagged, Early])
def test_branches_that_the_example_did_not_take(kind):
    model, x = pruned(kind()), torch.randn(64, 64)
    compiled = fast(model, x)
    tall = torch.randn(128, 64)
    torch.testing.assert_close(compiled(tall), model(tall), rtol=1e-4, atol=1e-4)
    if kind is not Tall:
        found, wanted = compiled(x, True), model(x, True)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_writes_between_two_layers():
    model, x = pruned(Filled()), torch.randn(64, 64)
    compiled = fast(model, (x, torch.ones(64, dtype=torch.bool)))
    keep, before = torch.arange(64) % 2 == 0, x.clone()
    found = compiled(x, keep)
    assert torch.equal(x, before)
    torch.testing.assert_close(found, model(x, keep), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Features, Inner])
def test_other_methods(kind):
    model, x = pruned(kind()), torch.randn(64, 64)
    compiled = fast(model, x)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.features(x), model.features(x), rtol=1e-4, atol=1e-4)


def test_state_that_the_forward_pass_changes():
    x = torch.randn(64, 64)
    model = pruned(Counting())
    compiled = fast(model, x)
    before = int(compiled.n)
    compiled(x), compiled(x)
    assert int(compiled.n) == before + 2
    assert int(model.n) == 0
    compiled = fast(pruned(Logging()), x)
    before = len(compiled.log)
    compiled(x)
    assert len(compiled.log) == before + 1


def test_state_that_steers_the_forward_pass():
    x = torch.randn(64, 64)
    model = pruned(Gated())
    compiled = fast(model, x)
    compiled.load_state_dict(compiled.state_dict() | {"gate": torch.ones(())})
    torch.testing.assert_close(compiled(x), 2 * model(x), rtol=1e-4, atol=1e-4)


def test_a_number_written_into_a_forward_pass_cannot_be_changed_silently():
    x = torch.randn(64, 64)
    model = pruned(Scaled())
    compiled = fast(model, x)
    assert hasattr(type(compiled), "prunus_forward")
    with pytest.raises(ValueRangeError, match="alpha"):
        compiled.alpha = 2.0
    compiled.alpha = 0.5
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_is_not_folded_where_the_layer_is_seen_alone():
    model, x = pruned(Folded()), torch.randn(2, 16, 12, 12)
    compiled = fast(model, x)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x, True), model(x, True), rtol=1e-4, atol=1e-4)


def test_a_view_that_only_contiguous_tensors_have():
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x).view(-1) + self.k(x).view(-1)

    model, x = pruned(Views()), torch.randn(64, 64)
    torch.testing.assert_close(fast(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


class Writing(Two):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.b(torch.relu(self.a(x)))


def test_a_forward_pass_that_writes_to_its_input():
    model, x = pruned(Writing()), torch.randn(64, 64)
    compiled, wanted = fast(model, x.clone()), model(x.clone())
    torch.testing.assert_close(compiled(x.clone()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [Two, Folded])
def test_tensors_whose_memory_holds_the_negative(build):
    class Plain(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x)))

    model = pruned(Plain() if build is Two else Folded())
    x = torch.randn(64, 64) if build is Two else torch.randn(2, 16, 12, 12)
    compiled = fast(model, x)
    negative = torch._neg_view(x)  # pyright: ignore[reportPrivateImportUsage]
    torch.testing.assert_close(compiled(negative), model(-x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layers_run_their_packed_layers(masked, monkeypatch):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not masked))
    x = torch.randn(2, 9, 64)
    example = {"src": x}
    if masked:
        example["src_key_padding_mask"] = torch.arange(9).expand(2, 9) > torch.tensor([[8], [5]])
    compiled = pr.compile(model, example)
    calls = []
    plain = SparseLinear.forward
    monkeypatch.setattr(
        SparseLinear, "forward", lambda *args, **named: calls.append(1) or plain(*args, **named)
    )
    wanted = model(**example)
    torch.testing.assert_close(compiled(**example), wanted, rtol=1e-4, atol=1e-4)
    assert calls


def test_rotary_frequencies_keep_their_precision_in_bfloat16():
    class Rotary(nn.Module):
        frequencies: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.register_buffer("frequencies", 1.1 ** -torch.arange(64.0), persistent=False)

        def forward(self, x: Tensor, position: int = 2001) -> Tensor:
            return self.layer(x) * torch.cos(position * self.frequencies).to(x.dtype)

    model = Rotary().eval()
    assert torch.equal(in_bfloat16(model).frequencies, model.frequencies)
    assert in_bfloat16(model).layer.weight.dtype == torch.bfloat16

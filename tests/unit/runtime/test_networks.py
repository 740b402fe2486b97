"""Modules of packed convolutions only: which they are, what one call gives, what falls back."""

from __future__ import annotations

import copy
import io
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from prunus import kernels
from prunus.errors import ShapeError
from prunus.runtime import SparseConv2d, compile, load, networks, save
from prunus.runtime.assemble import assemble
from prunus.runtime.network import Network

pytestmark = pytest.mark.skipif(kernels.network_ptr is None, reason="no native module")


class Block(nn.Module):
    """A bottleneck with a residual, as `compile` leaves it: layers take what they add."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.norm = sparse(width, 20, 1, activation="relu6"), nn.Identity()
        self.middle = sparse(20, 20, 3, padding=1, groups=20, activation="relu")
        self.last = sparse(20, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.norm(self.first(x))), residual=x)


class Backbone(nn.Module):
    """A stem with a stride, two blocks; what is behind the last convolution is outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = sparse(3, 12, 3, stride=2, padding=1, activation="relu")
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


def sparse(inputs: int, outputs: int, kernel: int, activation: str = "", **named) -> SparseConv2d:
    dense = nn.Conv2d(inputs, outputs, kernel, **named)
    with torch.no_grad():
        dense.weight *= torch.rand(dense.weight.shape) < 0.5
    made = SparseConv2d.from_dense(dense)
    made.activation = activation
    return made


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    """The model layer by layer, and as a network."""
    torch.manual_seed(0)
    model = Model().eval().requires_grad_(False)
    found = dict(networks.find(model, {}))
    assert list(found) == ["backbone"]
    return model, assemble(model, {}, found, share=True)


def together(model: nn.Module) -> bool:
    return isinstance(getattr(model.get_submodule("backbone"), "prunus_forward", None), Network)


@torch.no_grad()
def test_one_call_gives_what_the_layers_give(pair, monkeypatch):
    apart, one = pair
    calls = []
    real = kernels.network_ptr
    monkeypatch.setattr(kernels, "network_ptr", lambda *given: (calls.append(1), real(*given)))
    for shape in ((1, 3, 16, 16), (5, 3, 17, 9), (2, 3, 1, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(one(x), apart(x), rtol=1e-5, atol=1e-5)
        turned = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(one(turned), apart(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 6
    assert together(one)
    assert one.state_dict().keys() == apart.state_dict().keys()


@torch.no_grad()
def test_copies_and_pickles_stay_networks(pair):
    _, one = pair
    x = torch.randn(2, 3, 8, 8)
    held = io.BytesIO()
    torch.save(one, held)
    held.seek(0)
    for other in (copy.deepcopy(one), torch.load(held, weights_only=False)):
        assert together(other)
        assert torch.equal(other(x), one(x))
    assert type(one.backbone).__name__ == "Backbone"


def test_hooks_gradients_and_other_dtypes_pass_the_layers(pair):
    apart, one = pair
    x = torch.randn(2, 3, 8, 8)
    seen = []
    handle = one.backbone.blocks[0].middle.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        wanted = apart(x)
        torch.testing.assert_close(one(x), wanted)
        assert len(seen) == 1
        handle.remove()
        one(x)
        assert len(seen) == 1
    needs = x.clone().requires_grad_()
    one(needs).sum().backward()
    again = x.clone().requires_grad_()
    apart(again).sum().backward()
    torch.testing.assert_close(needs.grad, again.grad)
    half = one.backbone(x.bfloat16())
    assert half.dtype == apart.backbone(x.bfloat16()).dtype


@torch.no_grad()
def test_exchanged_layers_and_new_weights_are_seen(pair):
    apart, one = pair
    x = torch.randn(1, 3, 8, 8)
    before = one(x)
    new = torch.randn_like(one.backbone.stem.bias)
    one.backbone.stem.bias = apart.backbone.stem.bias = new
    torch.testing.assert_close(one(x), apart(x))
    assert not torch.allclose(one(x), before)
    one.backbone.blocks[1].middle = nn.Identity()
    apart.backbone.blocks[1].middle = nn.Identity()
    torch.testing.assert_close(one(x), apart(x))


def test_wrong_images_get_the_error_of_the_layer(pair):
    apart, one = pair
    for shape in ((1, 4, 8, 8), (3, 8, 8, 8)):
        with pytest.raises(ShapeError) as said, torch.no_grad():
            one(torch.randn(shape))
        with pytest.raises(ShapeError) as wanted, torch.no_grad():
            apart(torch.randn(shape))
        assert str(said.value) == str(wanted.value)


@torch.no_grad()
def test_export_and_torch_compile_see_the_layers(pair):
    apart, one = pair
    x = torch.randn(1, 3, 8, 8)
    wanted = apart(x)
    exported = torch.export.export(one, (x,)).module()
    torch.testing.assert_close(exported(x), wanted)
    torch.testing.assert_close(torch.compile(one, backend="eager")(x), wanted)


def test_what_else_a_module_does_makes_it_no_network():
    torch.manual_seed(0)

    class Doubled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Early(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.last(self.middle(y), residual=x)
            return y

    hooked = Block()
    hooked.middle.register_forward_hook(lambda m, i, o: None)
    for module in (Doubled(), Early(), hooked, sparse(3, 4, 1), nn.Sequential(nn.Linear(3, 3))):
        assert networks.describe(module) is None
    assert networks.describe(Block()) is not None


@torch.no_grad()
def test_compile_prints_replays_and_saves_networks(tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand_like(parameter) > 0.9

    def timed(runs, **_):
        return {
            name: 1.0 if name.startswith(("dense", "channels", "apart")) else 0.1 for name in runs
        }

    for module in ("decide", "whole"):
        monkeypatch.setattr(f"prunus.runtime.{module}.interleaved", timed)
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "times"))
    x = torch.randn(1, 3, 32, 32)
    fast = cast(Any, compile(model, x, threads=1))
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert "networks" in str(fast.plan)
    assert fast.plan.to_dict()["networks"] == ["0"]
    again = cast(Any, compile(model, x, choose=fast.plan.choose))
    assert again.plan.networks == fast.plan.networks
    save(fast, tmp_path / "model.safetensors")
    for parameter in again.buffers():
        if parameter.dtype == torch.float32:
            parameter.zero_()
    load(tmp_path / "model.safetensors", again)
    assert torch.equal(again(x), fast(x))

"""Synaptic flow through norms that take statistics of their input: they count as their scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import methods
from prunus.drive import Sources, collect
from prunus.drive.signals.flow import positive_network
from prunus.errors import SignalError
from prunus.kinds import FLOW, IMPORTANCE
from prunus.sites import find, parameters


def signal(model, inputs, kind=FLOW):
    sites = find(model)
    sources = Sources(model, sites, parameters(model, sites), {}, inputs=inputs)
    return collect(frozenset({kind}), sources).tensors[kind]


class PlusOneRMSNorm(nn.Module):
    """As in Gemma: the scale is 1 + weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


class Functional(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:], weight=self.scale)


NORMS = {
    "layer": lambda: nn.LayerNorm(6),
    "layer without scale": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "functional": lambda: Functional(6),
    "group": lambda: nn.GroupNorm(2, 6),
    "batch without statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "own rms": lambda: PlusOneRMSNorm(6),
} | ({"rms": lambda: nn.RMSNorm(6)} if hasattr(nn, "RMSNorm") else {})


def scale_of(norm):
    if isinstance(norm, PlusOneRMSNorm):
        return (1 + norm.weight).abs()
    weight = getattr(norm, "weight", getattr(norm, "scale", None))
    return torch.ones(6) if weight is None else weight.abs()


@pytest.mark.parametrize("name", NORMS)
def test_flow_through_a_norm_by_hand(name):
    """R = 1^T |W2| diag |scale| |W1| 1, and its derivatives."""
    torch.manual_seed(0)
    norm = NORMS[name]()
    for p in norm.parameters():
        p.data.normal_()
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 3))
    first, last = (model[i].weight.detach().double().abs() for i in (0, 3))
    scale = scale_of(norm).detach().double()
    found = signal(model, torch.randn(5, 4))
    into = (last.sum(0) * scale)[:, None].expand(6, 4)
    torch.testing.assert_close(found["0.weight"], into, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        found["3.weight"], (first.sum(1) * scale).expand(3, 6), rtol=1e-5, atol=1e-9
    )
    # conservation: the scores of every layer sum to R
    sums = [(found["0.weight"] * first).sum(), (found["3.weight"] * last).sum()]
    torch.testing.assert_close(sums[0], sums[1])
    importance = signal(model, torch.randn(5, 4), IMPORTANCE)
    assert importance["0.weight"].min() > 0


def test_instance_norm_in_a_convolution_network():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Conv2d(4, 3, 3)
    )
    found = signal(model, torch.randn(1, 2, 8, 8))
    sums = [float((found[f"{i}.weight"] * model[i].weight.detach().abs()).sum()) for i in (0, 3)]
    assert sums[0] == pytest.approx(sums[1])
    assert sums[0] > 0.1


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_no_layer_of_a_transformer_collapses(sparsity):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    masks = pr.prune(model, methods.synflow(sparsity), inputs=torch.randn(2, 5, 16))
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    assert len(kept) == 8
    assert min(kept.values()) > 0, kept


class Masked(nn.Module):
    """Attention with an additive mask in a buffer."""

    def __init__(self, lowest):
        super().__init__()
        self.value, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((3, 3), lowest).triu(1))

    def forward(self, x):
        weights = torch.softmax(torch.zeros(3, 3, dtype=x.dtype) + self.mask, -1)
        return self.out(weights @ self.value(x))


def test_attention_masks_stay_masks():
    sites = find(model := Masked(-1e4))
    state, _ = positive_network(Sources(model, sites, parameters(model, sites), {}))
    assert torch.equal(state["mask"], model.mask.double())


def test_an_infinite_mask_leaves_the_flow_finite():
    torch.manual_seed(0)
    model = Masked(float("-inf"))
    found = signal(model, torch.randn(1, 3, 4))
    by_hand = 3 * model.value.weight.detach().double().abs().sum(1)  # rows of the softmax sum to 1
    torch.testing.assert_close(found["out.weight"], by_hand.expand(2, 4))


def test_a_site_without_flow_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    before = model[0].weight.clone()
    with pytest.raises(SignalError, match=r"0\.weight.*exclude"):
        pr.prune(model, methods.synflow(0.5), inputs=torch.randn(1, 4))
    assert torch.equal(model[0].weight, before)

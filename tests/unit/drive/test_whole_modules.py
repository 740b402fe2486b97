"""Weights that nn.MultiheadAttention, nn.LSTM and nn.GRU multiply with themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import methods
from prunus.errors import SignalError


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gates = nn.LSTM(6, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x):
        h = self.gates(self.cell(x)[0])[0]
        h = h + self.attend(h, h, h)[0]
        return self.cross(h, x, x)[0].mean(1)


SITES = {
    *(f"cell.weight_{kind}_l0" for kind in ("ih", "hh")),
    *(f"gates.weight_{kind}_l0" for kind in ("ih", "hh")),
    *(f"attend.{name}" for name in ("in_proj_weight", "out_proj.weight")),
    *(f"cross.{name}_proj_weight" for name in "qkv"),
    "cross.out_proj.weight",
}


def start():
    torch.manual_seed(0)
    return Mixed(), (torch.randn(4, 5, 6), torch.randint(0, 8, (4,)))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", ["one_shot_magnitude", "lamp", "random_pruning", "snip", "taylor"])
def test_scores_of_weights_and_gradients_take_them(name):
    model, batch = start()
    masks = pr.prune(model, getattr(methods, name)(0.75), batches=[batch], loss=loss)
    assert set(masks) == SITES
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == pytest.approx(sum(m.numel() for m in masks.values()) / 4, abs=len(masks))
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)


@pytest.mark.parametrize("name", ["gradual_magnitude", "rigl"])
def test_training_keeps_their_zeros_and_files_hold_them(name, tmp_path):
    model, batch = start()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attached = pr.attach(getattr(methods, name)(0.8, 12, every=2), model, optimizer)
    for _ in range(14):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        for site, mask in attached.masks.items():
            assert not model.get_parameter(site)[~mask].any()
    assert attached.sparsity == pytest.approx(0.8, abs=0.01)
    held = optimizer.state_dict()

    twin, _ = start()
    twin.load_state_dict(model.state_dict())
    other = torch.optim.Adam(twin.parameters(), lr=1e-2)
    again = pr.attach(getattr(methods, name)(0.8, 12, every=2), twin, other)
    other.load_state_dict(held)
    for site, mask in attached.masks.items():
        assert torch.equal(again.masks[site], mask)

    saved = pr.save(model, tmp_path / "model.safetensors")
    assert all(saved.formats[site] != "dense" for site in SITES)
    loaded = pr.load(tmp_path / "model.safetensors", Mixed())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(loaded(batch[0]), model(batch[0]))


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "apoz"])
@pytest.mark.parametrize("site", sorted(SITES))
def test_methods_that_read_inputs_or_outputs_refuse_by_name(name, site):
    model, batch = start()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SignalError, match=site.replace(".", r"\.")):
        pr.prune(model, getattr(methods, name)(0.5), batches=[batch[0]], include=site)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())

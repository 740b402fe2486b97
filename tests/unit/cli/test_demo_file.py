"""The demo's promise about bytes, without its training: 95% sparse, 12% of the dense file."""

from __future__ import annotations

import pytest
import torch

import prunus as pr
from prunus import sites
from prunus.cli.demo import SPARSITY, experiments


@pytest.mark.parametrize("number", [0, 1], ids=["mlp", "cnn"])
def test_the_sparse_file_of_the_demo_is_small_and_comes_back(number, tmp_path):
    experiment = experiments(1, tmp_path)[number]
    model = experiment.model(0)
    dense = pr.save(model, tmp_path / "dense.safetensors", format="dense")
    masks = pr.prune(model, experiment.method(None, 48))
    sparse = pr.save(model, tmp_path / "sparse.safetensors")
    total = sum(site.size for site in sites.find(model))  # a site that stays dense has no mask
    off = sum(int((~mask).sum()) for mask in masks.values())
    assert abs(off - SPARSITY * total) <= 1
    limit = {"mlp": 0.12, "cnn": 0.15}[experiment.name]
    assert sparse.bytes <= limit * dense.bytes
    again = pr.load(tmp_path / "sparse.safetensors", experiment.model(1))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())

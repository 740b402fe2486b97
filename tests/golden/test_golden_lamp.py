"""LAMP against a brute force in float64: streamed selection, ties, and scores it cannot rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus as pr
from prunus import allocations, schedules, scores, structures
from prunus.allocations import adaptive
from prunus.core import Site
from prunus.errors import TargetError


def by_definition(values, keep):
    """Rank every unit by (ratio, site, place in its site); count the first `keep` of each site."""
    ranked = []
    for site, flat in values.items():
        total = 0.0
        for rank, s in enumerate(sorted(flat.double().tolist(), reverse=True)):
            total += max(s, 0.0) ** 2
            ratio = 1.0 if rank == 0 else max(s, 0.0) ** 2 / max(total, 1e-300)
            ranked.append((-ratio, len(ranked), site))
    kept = [site for _, _, site in sorted(ranked)[:keep]]
    return {site: kept.count(site) for site in values}


def counts(values, sparsity):
    sites = [Site(name, tuple(v.shape)) for name, v in values.items()]
    shares = allocations.lamp().share(sites, {n: v[None] for n, v in values.items()}, sparsity)
    return {s.name: round((1 - shares[s.name]) * s.size) for s in sites}


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.floats(0, 1),
    st.integers(0, 1000),
    st.sampled_from([1, 7, 64, 1 << 14]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_number_of_marks_gives_the_definition(sizes, sparsity, seed, sample, ties):
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for place, size in enumerate(sizes):
        drawn = torch.rand(size, generator=generator, dtype=torch.float64) + 0.01
        values[f"s{place}"] = (drawn * 8).ceil() / 8 if ties else drawn
    keep = round((1 - sparsity) * sum(sizes))
    before, adaptive._SAMPLE = adaptive._SAMPLE, sample
    try:
        found = counts(values, 1 - keep / sum(sizes))
    finally:
        adaptive._SAMPLE = before
    assert sum(found.values()) == keep
    wanted = by_definition(values, keep)
    if ties:  # equal ratios of two sites may differ in their last bit
        assert all(abs(found[n] - wanted[n]) <= len(sizes) for n in found)
    else:
        assert found == wanted


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def test_scores_below_zero_are_refused_instead_of_removing_a_layer():
    method = pr.compose(
        pr.core.Score("negative", lambda w, at: -1 - w.abs()),
        structure=structures.neuron(),
        allocation=allocations.lamp(),
        schedule=schedules.one_shot(0.5),
    )
    with pytest.raises(TargetError, match=r"0\.weight"):
        pr.prune(network(), method, include="*.weight")


@pytest.mark.parametrize("score", [scores.magnitude(), pr.core.Score("moved", lambda w, at: w)])
def test_every_site_keeps_one_whatever_its_size_or_zeros(score):
    model = network()
    nn.init.zeros_(model[2].weight)
    method = pr.compose(
        score, allocation=allocations.lamp(), schedule=schedules.one_shot(1 - 2 / 144)
    )
    masks = pr.prune(model, method)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": 1, "2.weight": 1}


def test_infinite_scores_come_first():
    values = {"a": torch.tensor([float("inf"), 1.0, 2.0]), "b": torch.tensor([1.0, 1.0, 1.0])}
    assert counts(values, 1 - 3 / 6) == {"a": 1, "b": 2}

"""Selection against a stable sort, for every kind of number and of tie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import select
from prunus.core import Site
from prunus.errors import NotFiniteError, TargetError, ValueRangeError

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, 1e-40, -1e-40, 3e4])
ANY = st.floats(allow_nan=False, width=32)
VALUES = st.one_of(FEW, ANY)


def rows_of(values, rows, dtype):
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(rows, -1)


def reference(scores: torch.Tensor, k: int) -> np.ndarray:
    """Stable argsort, descending; NumPy, float64 (exact for all dtypes)."""
    values = scores.double().numpy() + 0.0
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    kept = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept


@st.composite
def scores_and_k(draw):
    rows = draw(st.integers(1, 4))
    units = draw(st.integers(1, 40))
    values = draw(st.lists(VALUES, min_size=rows * units, max_size=rows * units))
    return rows_of(values, rows, draw(DTYPES)), draw(st.integers(0, units))


@settings(max_examples=150, deadline=None)
@given(scores_and_k())
def test_keep_top_is_a_stable_sort(case):
    scores, k = case
    before = scores.clone()
    assert np.array_equal(select.keep_top(scores, k).numpy(), reference(scores, k))
    assert torch.equal(before, scores)


def force(patch, path):
    """Send every selection through one path: partition, histograms, a sample that often misses."""
    patch.setattr(select, "_SORT_WIDTH", 0)
    if path == "partition":
        return
    patch.setattr(select, "_keep_by_partition", lambda *args: False)
    if path == "digits":
        patch.setattr(select, "_by_sample", lambda *args: None)
    else:
        patch.setattr(select, "_SAMPLE", path)


PATHS = st.sampled_from(["partition", "digits", 1 << 16, 8, 2])


@settings(max_examples=300, deadline=None)
@given(scores_and_k(), st.integers(1, 17), PATHS)
def test_the_streamed_paths_are_stable_sorts_too(case, chunk, path):
    scores, k = case
    with pytest.MonkeyPatch.context() as patch:
        force(patch, path)
        patch.setattr(select, "CHUNK", chunk)
        assert np.array_equal(select.keep_top(scores, k).numpy(), reference(scores, k))


@pytest.mark.parametrize("units", [4095, 4096, 4097, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", [3, 50, 10**6])
def test_both_paths_agree_around_the_width_where_they_switch(units, dtype, levels):
    generator = torch.Generator().manual_seed(units + levels)
    scores = torch.randint(-levels, levels, (3, units), generator=generator).to(dtype) / 7
    for k in (1, 2, units // 3, units - 1):
        assert np.array_equal(select.keep_top(scores, k).numpy(), reference(scores, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_long_row_with_every_kind_of_number(dtype):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(60_000, generator=generator, dtype=torch.float64)
    scores[::7] = 0.0
    scores[1::7] = -0.0
    scores[2::11] = math.inf
    scores[3::11] = -math.inf
    scores[4::13] = 1e-42  # a denormal of float32
    scores = scores.to(dtype).reshape(1, -1)
    for k in (1, 5_000, 6_000, 30_000, 40_000, 55_000, 59_999):
        assert np.array_equal(select.keep_top(scores, k).numpy(), reference(scores, k))


def test_neighbouring_floats_are_told_apart():
    one = torch.ones(5000, dtype=torch.float64)
    one[3000] = np.nextafter(1.0, 2.0)
    assert select.keep_top(one.reshape(1, -1), 1)[0, 3000]
    narrow = torch.ones(5000)
    narrow[3000] = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert not select.keep_top(narrow.reshape(1, -1), 4999)[0, 3000]


@pytest.mark.parametrize("k", [-1, 4])
def test_impossible_counts_are_refused(k):
    with pytest.raises(ValueRangeError, match=f"{k} of 3"):
        select.keep_top(torch.ones(2, 3), k)


def test_nan_is_refused_with_the_name_of_the_site():
    with pytest.raises(NotFiniteError, match=r"'a\.weight'.*\(2, 3\)"):
        select.check_scores(torch.tensor([[1.0, 2, 3], [1, math.nan, 2]]), "a.weight")
    with pytest.raises(NotFiniteError, match="int64"):
        select.check_scores(torch.ones(3, dtype=torch.int64), "a")
    infinite = torch.tensor([math.inf, -math.inf])
    assert select.check_scores(infinite, "a") is infinite


# --- global counts ----------------------------------------------------------------------------


def brute_counts(scores, sizes, keep):
    """Rank all units of all sites together: by score, then site, then index."""
    ranked = sorted(
        (
            (-float(v), place, index, name)
            for place, name in enumerate(sizes)
            for index, v in enumerate(scores[name].reshape(-1).double().tolist())
        ),
    )
    kept = dict.fromkeys(sizes, 0)
    for _, _, _, name in ranked:
        if keep < sizes[name] / 2:
            break
        kept[name] += 1
        keep -= sizes[name]
    return kept


@st.composite
def networks(draw, unit=None):
    count = draw(st.integers(1, 4))
    dtype = draw(DTYPES)
    scores, sizes = {}, {}
    for place in range(count):
        units = draw(st.integers(0 if place else 1, 12))
        values = draw(st.lists(VALUES, min_size=units, max_size=units))
        scores[f"s{place}"] = rows_of(values, 1, dtype) if units else torch.zeros(1, 0, dtype=dtype)
        sizes[f"s{place}"] = unit or draw(st.sampled_from([1, 2, 4, 9]))
    total = sum(scores[n].numel() * sizes[n] for n in sizes)
    return scores, sizes, total


@settings(max_examples=300, deadline=None)
@given(networks(unit=1), st.floats(0, 1), PATHS)
def test_global_counts_of_single_weights_are_a_full_sort(case, fraction, path):
    scores, sizes, total = case
    keep = round(fraction * total)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, path)
        assert select.global_counts(scores, sizes, keep) == brute_counts(scores, sizes, keep)
        got = select.global_counts(scores, sizes, fraction * total)
    assert abs(sum(got.values()) - fraction * total) <= 0.5 + 1e-9


@settings(max_examples=300, deadline=None)
@given(networks(), st.floats(0, 1), PATHS)
def test_global_counts_of_units_come_within_one_unit_and_rank_rightly(case, fraction, path):
    scores, sizes, total = case
    with pytest.MonkeyPatch.context() as patch:
        force(patch, path)
        got = select.global_counts(scores, sizes, fraction * total)
    kept = sum(got[name] * sizes[name] for name in sizes)
    assert abs(kept - fraction * total) <= max(sizes.values())
    lowest_kept, highest_cut = math.inf, -math.inf
    for name, count in got.items():
        ranked = sorted(scores[name].reshape(-1).double().tolist(), reverse=True)
        lowest_kept = min([lowest_kept, *ranked[:count]])
        highest_cut = max([highest_cut, *ranked[count:]])
    assert lowest_kept >= highest_cut


def test_ties_go_to_earlier_sites():
    scores = {"a": torch.ones(1, 4), "b": torch.ones(1, 4), "c": torch.full((1, 2), 2.0)}
    assert select.global_counts(scores, dict.fromkeys(scores, 1), 7) == {"a": 4, "b": 1, "c": 2}


@pytest.mark.parametrize("path", ["partition", "digits", 1 << 16, 1 << 8, 1 << 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_sites_match_a_full_sort(dtype, path, monkeypatch):
    force(monkeypatch, path)
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: (torch.randn(1, size, generator=generator) * scale).abs().to(dtype)
        for name, size, scale in (("a", 70_000, 1.0), ("b", 1, 9.0), ("c", 30_011, 0.01))
    }
    scores["c"][0, :20_000] = scores["a"][0, 123]
    pool = torch.cat([scores[n].reshape(-1).double() for n in scores])
    owner = np.repeat([0, 1, 2], [scores[n].numel() for n in scores])
    order = np.argsort(-pool.numpy(), kind="stable")
    for keep in (1, 2, 777, 50_000, 99_999, 100_012):
        expected = np.bincount(owner[order[:keep]], minlength=3).tolist()
        got = select.global_counts(scores, dict.fromkeys(scores, 1), keep)
        assert list(got.values()) == expected


# --- apportion --------------------------------------------------------------------------------

SHARES = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from([1, 2, 4, 9]), st.floats(0, 1)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(SHARES)
def test_apportioned_counts_add_up_and_none_is_off_by_more_than_one(rows):
    sites = [Site(f"s{i}", (units, grain)) for i, (units, grain, _) in enumerate(rows)]
    grain = {f"s{i}": g for i, (_, g, _) in enumerate(rows)}
    shares = {f"s{i}": share for i, (_, _, share) in enumerate(rows)}
    counts = select.apportion(sites, shares, grain)
    for site in sites:
        wanted = (1 - shares[site.name]) * site.shape[0]
        assert 0 <= counts[site.name] <= site.shape[0]
        assert abs(counts[site.name] - wanted) < 1 + 1e-5
    kept = sum(counts[n] * grain[n] for n in counts)
    wanted = sum((1 - shares[s.name]) * s.size for s in sites)
    assert abs(kept - wanted) <= max(grain.values()) / 2 + 1e-3


@given(st.integers(1, 2000), st.data())
def test_a_share_that_is_a_whole_count_is_met_exactly(units, data):
    kept = data.draw(st.integers(0, units))
    assert select.apportion([Site("s", (units,))], {"s": 1 - kept / units}, {"s": 1}) == {"s": kept}


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_its_range_is_refused_by_site(share):
    with pytest.raises(TargetError, match=r"'s'.*\(4, 2\)"):
        select.apportion([Site("s", (4, 2))], {"s": share}, {"s": 1})

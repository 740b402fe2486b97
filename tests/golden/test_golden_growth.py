"""Growth and the dynamic methods against plain NumPy loops in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from growth_case import SHAPES, best, draw, drive, model_and_data
from torch import nn
from torch.nn import functional as F

from prunus import (
    attach,
    compose,
    growth,
    methods,
    rng,
    schedules,
    scores,
    structures,
)
from prunus import sites as sites_
from prunus.compose.redistribute import redistributed, spread
from prunus.core import Context, Site
from prunus.drive.signals import Sources, collect
from prunus.errors import CompositionError, NotFiniteError, SignalError
from prunus.kinds import COACTIVATION


def test_sparse_momentum_by_loops():
    method = methods.sparse_momentum(0.6, 40, every=4, fraction=0.5)
    average, moved, shifted = None, 0, 0
    for step, old, new, _ in drive(method, 20, lambda t: draw(100 + t), lambda t: draw(t)):
        if old is None:
            total = sum(int(m.sum()) for m in new.values())
            continue
        grads = {n: g.numpy() for n, g in draw(step).items()}
        average = {
            n: 0.1 * g if average is None else 0.9 * average[n] + 0.1 * g for n, g in grads.items()
        }
        if step % 4:
            assert all(np.array_equal(old[n], new[n]) for n in SHAPES)
            continue
        rate = 0.25 * (1 + math.cos(math.pi * step / 40))
        stay, share = {}, {}
        for n, w in draw(100 + step).items():
            drop = int(rate * old[n].sum() + 1e-6)
            stay[n] = best(np.abs(w.numpy()), old[n], int(old[n].sum()) - drop)
            share[n] = np.abs(average[n])[old[n]].mean()
        missing = total - sum(int(m.sum()) for m in stay.values())
        wanted = {n: missing * share[n] / sum(share.values()) for n in SHAPES}
        for n in SHAPES:
            grown = int(new[n].sum() - stay[n].sum())
            assert abs(grown - wanted[n]) < 1
            assert np.array_equal(new[n], stay[n] | best(np.abs(average[n]), ~old[n], grown)), n
            shifted += abs(grown - int(old[n].sum() - stay[n].sum()))
        moved += missing
        assert sum(int(m.sum()) for m in new.values()) == total
    assert moved > 50
    assert shifted > 0


def test_dynamic_reparameterization_by_loops():
    method = methods.dynamic_reparameterization(0.6, 60, every=3, threshold=0.05, fraction=0.2)
    limit, seen = 0.05, set()
    for step, old, new, result in drive(method, 36, lambda t: draw(t)):
        if old is None:
            continue
        w = {n: v.numpy() for n, v in draw(step).items()}
        stay = {n: old[n] & (np.abs(w[n]) >= limit) for n in SHAPES}
        kept, left = (sum(int(m.sum()) for m in ms.values()) for ms in (old, stay))
        for n in SHAPES:
            assert not (stay[n] & ~new[n]).any()
            assert not (new[n] & old[n] & ~stay[n]).any()
            grown = int(new[n].sum() - stay[n].sum())
            assert abs(grown - (kept - left) * stay[n].sum() / left) < 1
        assert sum(int(m.sum()) for m in new.values()) == kept
        if kept - left < 0.9 * 0.2 * kept:
            limit, _ = limit * 2, seen.add("doubled")
        elif kept - left > 1.1 * 0.2 * kept:
            limit, _ = limit / 2, seen.add("halved")
        (found,) = result.state.statistics["reparameterization threshold"].values()
        assert float(found) == pytest.approx(limit)
    assert seen == {"doubled", "halved"}


def test_deep_rewiring_by_loops():
    lr, l1, heat = 0.1, 0.5, 0.01
    method = methods.deep_rewiring(0.6, 50, lr=lr, l1=l1, temperature=heat)
    signs = {
        n: np.where(rng.uniform((5, n, "sign"), s).numpy() < 0.5, -1.0, 1.0)
        for n, s in SHAPES.items()
    }
    woken = 0
    for step, old, new, result in drive(method, 12, lambda t: draw(t, 0.2)):
        w = {n: v.numpy() for n, v in draw(step, 0.2).items()}
        if old is None:
            for n in SHAPES:
                assert np.array_equal(result.weights[n].numpy(), signs[n] * np.abs(w[n]))
            continue
        kept = sum(int(m.sum()) for m in old.values())
        assert sum(int(m.sum()) for m in new.values()) == kept
        for n, shape in SHAPES.items():
            key = rng.generator((5, step, n, "noise"))
            noise = torch.randn(shape, generator=key).double().numpy()
            theta = signs[n] * w[n] - lr * l1 + math.sqrt(2 * lr * heat) * noise
            awake = old[n] & (theta >= 0)
            assert not (awake & ~new[n]).any()
            np.testing.assert_allclose(
                result.weights[n].numpy(), np.where(awake, signs[n] * theta, 0), atol=1e-12
            )
            woken += int((new[n] & ~awake).sum())
    assert woken > 20


def test_coactivation_is_the_outer_product_of_both_ends():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    x = torch.randn(5, 2, 4, 4).double()

    found = sites_.find(model)
    sources = Sources(model, found, sites_.parameters(model, found), {}, inputs=x)
    signals = collect(frozenset({COACTIVATION}), sources).tensors[COACTIVATION]
    with torch.no_grad():
        first = model[0](x)
        hidden = model[2](model[1](first))
        last = model[3](hidden)
    expected = torch.einsum("no,ni->oi", last, hidden) / 5
    torch.testing.assert_close(signals["3.weight"], expected)
    kernel = np.zeros((3, 2, 2, 2))
    for n, o, c, i, j, p, q in itertools.product(*map(range, (5, 3, 2, 2, 2, 2, 2))):
        kernel[o, c, i, j] += float(first[n, o, p, q] * x[n, c, 2 * p + i, 2 * q + j]) / 5
    np.testing.assert_allclose(signals["0.weight"].numpy(), kernel, atol=1e-10)
    with pytest.raises(SignalError, match="inputs="):
        collect(frozenset({COACTIVATION}), Sources(model, found, sources.parameters, {}))


def test_hebbian_growth_in_training_needs_a_batch_and_moves():
    model, x, y = model_and_data()

    def method():
        return compose(
            scores.magnitude(),
            schedule=schedules.constant(0.5, 2, 20),
            grow=growth.hebbian(growth.fixed(0.3)),
            initial=scores.random(),
        )

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(method(), model, optimizer, inputs=x)
    start = {n: m.clone() for n, m in attached.masks.items()}
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert any(not torch.equal(start[n], attached.masks[n]) for n in start)
    assert attached.sparsity == pytest.approx(0.5, abs=0.01)


def test_preferential_attachment_draws_in_proportion_to_the_degrees():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, :3] = True
    mask[1, 0] = True
    grow = growth.preferential(growth.fixed(0.5))
    site, firsts = Site("w", (3, 4)), np.zeros((3, 4))
    degree_out, degree_in = mask.sum(1).numpy() + 1.0, mask.sum(0).numpy() + 1.0
    for seed in range(4000):
        ranks = grow.value(torch.zeros(3, 4), Context(site, {}, mask, (seed, 0, 0, "w")))
        ranks = ranks.masked_fill(mask, -math.inf)
        firsts.reshape(-1)[int(ranks.argmax())] += 1
    weight = np.outer(degree_out, degree_in) * ~mask.numpy()
    np.testing.assert_allclose(firsts / 4000, weight / weight.sum(), atol=0.03)


def test_granet_prunes_then_exchanges():
    method = methods.granet(0.8, 40, every=10, stop=1.0, fraction=0.4)
    for step, old, new, _ in drive(method, 41, lambda t: draw(t), lambda t: draw(900 + t)):
        if not step:
            continue
        asked = 0.8 * (1 - (1 - step / 40) ** 3)
        total = sum(math.prod(s) for s in SHAPES.values())
        count = round((1 - asked) * total)
        assert abs(sum(int(m.sum()) for m in new.values()) - count) <= 1
        w = {n: v.numpy() for n, v in draw(step).items()}
        pool = np.concatenate([np.where(old[n], np.abs(w[n]), -1).ravel() for n in SHAPES])
        chosen = best(pool, np.ones_like(pool, bool), sum(int(m.sum()) for m in new.values()))
        start, rate = 0, 0.2 * (1 + math.cos(math.pi * step / 40))
        for n, shape in SHAPES.items():
            k = int(chosen[start : start + math.prod(shape)].sum())
            start += math.prod(shape)
            free = int((~old[n]).sum())
            move = min(int(rate * k + 1e-6), free)
            stay = best(np.abs(w[n]), old[n], min(k - move, int(old[n].sum())))
            grads = np.abs(draw(900 + step)[n].numpy())
            assert int(new[n].sum()) == k
            added = best(grads, ~old[n], k - int(stay.sum()))
            assert np.array_equal(new[n], stay | added), (n, step)


def test_mest_drops_by_weight_and_gradient():
    method = methods.mest(0.5, 40, every=5, gradient=2.0, fraction=0.4, stop=1.0)
    for step, old, new, _ in drive(method, 11, lambda t: draw(t), lambda t: draw(50 + t)):
        if old is None:
            continue
        for n in SHAPES:
            importance = (draw(step)[n].abs() + 2 * draw(50 + step)[n].abs()).numpy()
            kept = int(old[n].sum())
            drop = int(0.2 * (1 + math.cos(math.pi * step / 40)) * kept + 1e-6)
            stay = best(importance, old[n], kept - drop)
            assert np.array_equal(old[n] & new[n], stay)
            assert int(new[n].sum()) == kept


def test_nest_grows_and_then_prunes():
    method = methods.nest(0.9, 100, every=10, seed_sparsity=0.95, peak_sparsity=0.5, grown=0.5)
    total, history = sum(math.prod(s) for s in SHAPES.values()), []
    for step, old, new, _ in drive(method, 100, lambda t: draw(7), lambda t: draw(8)):
        if old is not None and step < 50:
            for n in SHAPES:
                added = int((new[n] & ~old[n]).sum())
                assert not (old[n] & ~new[n]).any()
                grads = np.abs(draw(8)[n].numpy())
                assert np.array_equal(new[n], old[n] | best(grads, ~old[n], added))
        history.append(1 - sum(int(m.sum()) for m in new.values()) / total)
    assert history[0] == pytest.approx(0.95, abs=0.01)
    assert min(history) == pytest.approx(0.5, abs=0.01)
    assert history[-1] == pytest.approx(0.9, abs=0.01)


def test_spread_gives_the_overflow_to_others():
    one = dict.fromkeys("abc", 1)
    assert spread(10, {"a": 1, "b": 1, "c": 2}, {"a": 9, "b": 9, "c": 9}, one) == {
        "a": 3, "b": 2, "c": 5,
    }  # fmt: skip
    assert spread(10, {"a": 1, "b": 1, "c": 8}, {"a": 9, "b": 9, "c": 2}, one) == {
        "a": 4, "b": 4, "c": 2,
    }  # fmt: skip
    assert spread(5, {"a": 0, "b": 0, "c": 1}, {"a": 8, "b": 8, "c": 1}, one)["c"] == 1
    assert sum(spread(5, {"a": 0, "b": 0, "c": 0}, {"a": 8, "b": 8, "c": 0}, one).values()) == 5


def test_redistribution_of_nearly_dense_sites_conserves_the_count():
    sites = [Site("a", (10, 10)), Site("b", (10, 10))]
    layouts = {"a": (1, 100, 1), "b": (1, 100, 1)}
    stay, after = redistributed(sites, layouts, {"a": 95, "b": 95}, {"a": 1.0, "b": 3.0}, 0.5, 0.05)
    assert sum(after.values()) == 190
    assert all(stay[n] <= after[n] <= 100 for n in stay)
    with pytest.raises(NotFiniteError, match="'a'"):
        redistributed(sites, layouts, {"a": 1, "b": 1}, {"a": math.nan, "b": 1.0}, 0.5, 0.05)


def test_growth_by_blocks_is_refused_for_pinned_structures_only():
    with pytest.raises(CompositionError, match="fixes the count of every group"):
        methods.sparse_momentum(0.5, 10, structure=structures.n_of_m(2, 4))

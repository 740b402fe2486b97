"""Masks of named methods against independent NumPy loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from prunus import allocations, methods, structures
from prunus.core import Signals, Site
from prunus.drive import prune

SHAPES = {"a": (12, 10), "b": (7, 9), "c": (6, 4, 3, 3)}
SITES = tuple(Site(name, shape) for name, shape in SHAPES.items())


def weights_with_ties(seed=0):
    """Values on a coarse grid, so that magnitudes tie often."""
    rng = np.random.default_rng(seed)
    return {n: np.round(rng.normal(size=s) * 4) / 4 for n, s in SHAPES.items()}


def run(method, weights, signals=None, seed=0):
    tensors = {name: torch.from_numpy(w) for name, w in weights.items()}
    state = method.init(SITES, tensors, seed)
    while method.needs(state) is None:
        state = state.next_step()
    state = method.update(state, SITES, tensors, signals or Signals()).state
    return {
        n: state.masks[n].numpy() if n in state.masks else np.ones(SHAPES[n], bool) for n in SHAPES
    }


def top(scores, k):
    """Mask of the k highest, ties to the lower index."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.reshape(-1), kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_uniform_magnitude_is_an_argsort_per_site(sparsity):
    weights = weights_with_ties()
    found = run(methods.one_shot_magnitude(sparsity), weights)
    total = sum(w.size for w in weights.values())
    assert abs(sum(m.sum() for m in found.values()) - (1 - sparsity) * total) <= 1
    for name, w in weights.items():
        kept = int(found[name].sum())
        assert abs(kept - (1 - sparsity) * w.size) < 1
        assert np.array_equal(found[name], top(np.abs(w), kept))


@pytest.mark.parametrize("sparsity", [0.0, 0.13, 0.51, 0.9, 0.995, 1.0])
def test_global_magnitude_is_one_argsort_with_ties_by_site_then_index(sparsity):
    weights = weights_with_ties(1)
    method = methods.one_shot_magnitude(sparsity, allocation=allocations.global_())
    pool = np.concatenate([np.abs(w).reshape(-1) for w in weights.values()])
    flat = top(pool, round((1 - sparsity) * pool.size))
    start = 0
    for name, mask in run(method, weights).items():
        size = weights[name].size
        assert np.array_equal(mask.reshape(-1), flat[start : start + size]), name
        start += size


def test_block_magnitude_by_loops():
    weights = {n: w for n, w in weights_with_ties(2).items() if n != "b"}
    sites = [s for s in SITES if s.name != "b"]
    tensors = {n: torch.from_numpy(w) for n, w in weights.items()}
    method = methods.one_shot_magnitude(0.5, structure=structures.block(3, 2))
    state = method.update(method.init(sites, tensors, 0), sites, tensors, Signals()).state
    for name, w in weights.items():
        flat = np.abs(w).reshape(w.shape[0], -1)
        tiles = [(i, j) for i in range(0, flat.shape[0], 3) for j in range(0, flat.shape[1], 2)]
        sums = np.array([flat[i : i + 3, j : j + 2].sum() for i, j in tiles])
        mask = state.masks[name].numpy().reshape(flat.shape)
        chosen = top(sums, len(tiles) // 2)
        for keep, (i, j) in zip(chosen, tiles, strict=True):
            assert (mask[i : i + 3, j : j + 2] == keep).all()


def test_two_of_four_by_loops():
    rng = np.random.default_rng(3)
    w = rng.integers(-3, 4, size=(5, 8, 2, 2)).astype(float)
    site = (Site("w", w.shape),)
    method = methods.one_shot_magnitude(0.5, structure=structures.n_of_m(2, 4))
    given = {"w": torch.from_numpy(w)}
    mask = method.update(method.init(site, given, 0), site, given, Signals()).state.masks["w"]
    for out, y, x, group in itertools.product(range(5), range(2), range(2), (0, 4)):
        values = np.abs(w[out, group : group + 4, y, x])
        got = mask.numpy()[out, group : group + 4, y, x]
        assert np.array_equal(got, top(values, 2))


def test_channel_magnitude_by_loops():
    weights = weights_with_ties(4)
    found = run(methods.one_shot_magnitude(0.5, structure=structures.channel(1)), weights)
    for name, w in weights.items():
        sums = np.array([np.abs(w[:, i]).sum() for i in range(w.shape[1])])
        kept = found[name].reshape(w.shape[0], w.shape[1], -1)
        assert (kept == kept[:1, :, :1]).all()
        lowest = sums[kept[0, :, 0]].min(initial=np.inf)
        assert lowest >= sums[~kept[0, :, 0]].max(initial=-np.inf)


def test_snip_is_a_global_argsort_of_the_products():
    weights = weights_with_ties(5)
    rng = np.random.default_rng(6)
    grads = {n: np.round(rng.normal(size=s), 1) for n, s in SHAPES.items()}
    signals = Signals({"gradient": {n: torch.from_numpy(g) for n, g in grads.items()}})
    pool = np.concatenate([np.abs(weights[n] * grads[n]).reshape(-1) for n in SHAPES])
    flat, start = top(pool, round(0.2 * pool.size)), 0
    for mask in run(methods.snip(0.8), weights, signals).values():
        assert np.array_equal(mask.reshape(-1), flat[start : start + mask.size])
        start += mask.size


# --- synflow ----------------------------------------------------------------------------------


def numpy_flow(matrices):
    """Scores |w| dR/d|w| by a forward and a backward product; R = 1^T |W_L| ... |W_1| 1."""
    forward = [np.ones(matrices[0].shape[1])]
    for m in matrices:
        forward.append(np.abs(m) @ forward[-1])
    backward = [np.ones(matrices[-1].shape[0])]
    for m in reversed(matrices):
        backward.append(np.abs(m).T @ backward[-1])
    backward = backward[::-1]
    return [np.abs(m) * np.outer(backward[i + 1], forward[i]) for i, m in enumerate(matrices)]


@pytest.mark.parametrize("rounds", [1, 100])
def test_synflow_masks_equal_an_independent_loop(rounds):
    torch.manual_seed(0)
    widths = (20, 30, 25, 10)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    matrices = [layer.weight.detach().double().numpy() for layer in model]
    total = sum(m.size for m in matrices)
    masks = [np.ones(m.shape, bool) for m in matrices]
    kept = total
    for left in range(rounds, 0, -1):
        found = numpy_flow([m * k for m, k in zip(matrices, masks, strict=True)])
        pool = np.concatenate(
            [np.where(k, f, -np.inf).reshape(-1) for f, k in zip(found, masks, strict=True)]
        )
        kept = round(kept * (0.05 * total / kept) ** (1 / left))
        flat, start = top(pool, kept), 0
        for i, k in enumerate(masks):
            masks[i] = flat[start : start + k.size].reshape(k.shape)
            start += k.size
    got = prune(model, methods.synflow(0.95, rounds=rounds), inputs=torch.randn(3, 20))
    assert sum(int(m.sum()) for m in got.values()) == round(0.05 * total)
    for mask, expected in zip(got.values(), masks, strict=True):
        assert np.array_equal(mask.numpy(), expected)


def test_synflow_keeps_every_layer_alive_where_one_shot_scores_need_not():
    """A weak layer in the middle: at 99% global magnitude cuts it off, synflow may not."""

    def deep():
        torch.manual_seed(1)
        widths = (64, 128, 128, 128, 128, 128, 10)
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        with torch.no_grad():
            layers[3].weight.mul_(0.05)  # small weights, but everything has to pass through them
        return nn.Sequential(*(x for layer in layers for x in (layer, nn.ReLU())))

    model = deep()
    masks = prune(model, methods.synflow(0.99), inputs=torch.randn(1, 64))
    assert all(int(mask.sum()) > 0 for mask in masks.values())
    assert len(masks) == 6
    path = torch.ones(64)
    for mask in masks.values():  # a path from input to output is alive
        path = (mask.float() @ path > 0).float()
    assert path.sum() > 0
    collapsed = prune(deep(), methods.one_shot_magnitude(0.99, allocation=allocations.global_()))
    assert int(collapsed["6.weight"].sum()) == 0


# --- drop and grow ----------------------------------------------------------------------------


def numpy_move(w, mask, ranking, fraction):
    """Drop floor(fraction of kept) of the smallest |w|, grow as many of the highest ranking."""
    kept = int(mask.sum())
    count = min(int(fraction * kept), int((~mask).sum()))
    stay = top(np.where(mask, np.abs(w), -np.inf), kept - count)
    grown = top(np.where(mask, -np.inf, ranking), count) if count else np.zeros_like(mask)
    return stay | grown


@pytest.mark.parametrize("name", ["rigl", "set_"])
def test_dynamic_masks_equal_an_independent_loop(name):
    steps, every = 40, 5
    method = getattr(methods, name)(0.7, steps, every=every)
    rng = np.random.default_rng(7)
    weights = {n: rng.normal(size=s) for n, s in SHAPES.items()}
    state = method.init(SITES, {n: torch.from_numpy(w) for n, w in weights.items()}, 11)
    masks, moves = {}, 0
    for step in range(steps):
        grads = {n: rng.normal(size=s) for n, s in SHAPES.items()}
        needs = method.needs(state)
        if needs is not None:
            assert step % every == 0
            signals = Signals(
                {k: {n: torch.from_numpy(g) for n, g in grads.items()} for k in needs}
            )
            tensors = {n: torch.from_numpy(w) for n, w in weights.items()}
            state = method.update(state, SITES, tensors, signals).state
            new = {n: state.masks[n].numpy() for n in state.masks}
            for n, mask in masks.items():
                if name == "rigl":
                    end = int(steps * 0.75)
                    fraction = 0.15 * (1 + np.cos(np.pi * step / end))
                    expected = numpy_move(weights[n], mask, np.abs(grads[n]), fraction)
                    assert np.array_equal(new[n], expected)
                    moves += int((mask != expected).sum())
                else:  # what is dropped is fixed, what is grown is random
                    count = int(0.3 * mask.sum())
                    stay = top(np.where(mask, np.abs(weights[n]), -np.inf), int(mask.sum()) - count)
                    assert np.array_equal(new[n] & mask, stay)
                    assert int((new[n] & ~mask).sum()) == count
                    moves += count
            masks = new
        weights = {n: (w + 0.1 * rng.normal(size=w.shape)) * masks[n] for n, w in weights.items()}
        state = state.next_step()
    assert moves > 100
    assert method.needs(state) is None


def test_rigl_starts_from_a_random_erk_mask():
    tensors = {n: torch.randn(s) for n, s in SHAPES.items()}
    method = methods.rigl(0.7, 100)
    first, second = (
        method.update(method.init(SITES, tensors, seed), SITES, tensors, Signals()).state
        for seed in (0, 1)
    )
    shares = allocations.erk().share(SITES, {}, 0.7)
    for site in SITES:
        kept = int(first.masks[site.name].sum())
        assert abs(kept - (1 - shares[site.name]) * site.size) < 1
        assert not torch.equal(first.masks[site.name], second.masks[site.name])

"""Methods in which what is off returns, that observe the training, or that prune at the start."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from prunus import methods, scores
from prunus.compose import compose
from prunus.core import Signals, Site
from prunus.drive import attach, prune
from prunus.errors import SignalError
from prunus.schedules import one_shot


def mlp(widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def data(n_in, n_out, count=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, n_in, generator=generator).double()
    return x, torch.randint(0, n_out, (count,), generator=generator)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def weights_of(model):
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}


def top(values, k):
    kept = np.zeros(values.size, bool)
    kept[np.argsort(-values, kind="stable")[:k]] = True
    return kept


# --- phases -----------------------------------------------------------------------------------


def train(model, method, steps, *, watch, lr=0.1, **given):
    x, y = data(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    attached = attach(method, model, optimizer, **given)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        before = weights_of(model)
        optimizer.step()
        watch(step, attached, before)
    return attached


def test_ac_dc_prunes_returns_from_zero_and_ends_sparse():
    model = mlp((8, 16, 4))
    method = methods.ac_dc(0.75, 40, begin=4, sparse=6, dense=3)
    seen, off = [], {}

    def watch(step, attached, before):
        seen.append(round(attached.sparsity, 2))
        if step == 4:  # the masks were chosen from the weights before this step
            pool = np.concatenate([abs(before[n]).reshape(-1) for n in before])
            masks = [attached.masks[n].numpy().reshape(-1) for n in before]
            assert np.array_equal(np.concatenate(masks), top(pool, 48))
        if attached.sparsity and 4 <= step < 10:
            off.update({n: ~m.numpy() for n, m in attached.masks.items()})
        if step == 11:  # what returned at step 10 started from zero, without a step of its own
            for name, where in off.items():
                assert (before[name][where] == 0).all()
                assert (weights_of(model)[name][where] != 0).any()

    train(model, method, 40, watch=watch)
    assert seen[:4] == [0.0] * 4
    period = [0.75] * 6 + [0.0] * 3
    assert seen[4:31] == period * 3
    assert seen[31:] == [0.75] * 9


def test_dense_sparse_dense_ends_dense():
    model, seen = mlp((8, 16, 4)), []
    train(
        model,
        methods.dense_sparse_dense(0.5, 12),
        12,
        watch=lambda step, attached, before: seen.append(attached.sparsity),
    )
    assert seen == [0.0] * 4 + [0.5] * 4 + [0.0] * 4
    assert all((w != 0).all() for w in weights_of(model).values())


def test_adaptive_pruning_follows_the_validation_loss():
    model, seen = mlp((8, 16, 4)), []
    losses = iter([1.0, 0.5, 0.51, 0.4, 0.42])
    method = methods.adaptive_pruning(0.9, 10, begin=1, every=2)

    def watch(step, attached, before):
        seen.append(attached.sparsity)

    train(model, method, 10, watch=watch, validate=lambda: next(losses))
    reached, expected, best = 0.0, [], np.inf
    for value in [1.0, 0.5, 0.51, 0.4, 0.42]:
        best = min(best, value)
        overfit = 100 * (value / best - 1)
        reached = 1 - (1 - reached) * (1 - 2 / 3 * (1 - 1 / (1 + 2 * overfit)))
        expected.append(reached)
    assert seen[1::2] == pytest.approx(expected, abs=1 / 192)
    assert expected[-1] > expected[2] > 0
    model = mlp((8, 16, 4))
    with pytest.raises(SignalError, match="pass validate="):
        train(model, method, 10, watch=watch)


def test_movement_is_gathered_by_the_driver_at_every_step():
    model, total = mlp((8, 16, 4)), {}

    def watch(step, attached, before):
        gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
        if step < 5:
            for name, w in before.items():
                total[name] = total.get(name, 0.0) - gradients[name] * w
        if step == 5:
            for name, w in before.items():
                scores_ = (total[name] - dense[name] * w).reshape(-1)
                kept = attached.masks[name].numpy().reshape(-1)
                assert np.array_equal(kept, top(scores_, len(scores_) // 2))

    dense: dict[str, np.ndarray] = {}
    x, y = data(8, 4)
    method = compose(scores.movement(), schedule=one_shot(0.5, step=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(method, model, optimizer)
    for step in range(7):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        dense = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        before = weights_of(model)
        optimizer.step()
        watch(step, attached, before)
    assert attached.sparsity == 0.5


def test_global_sparse_momentum_by_its_update_rule():
    model, (x, y) = mlp((8, 16, 4), 7), data(8, 4)
    rate, beta, decay = 0.05, 0.98, 5e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=beta, weight_decay=decay)
    attached = attach(methods.global_sparse_momentum(0.75, 40, end=12), model, optimizer)
    w = np.concatenate([v.reshape(-1) for v in weights_of(model).values()])
    z, kept = np.zeros_like(w), np.ones(len(w), bool)
    for step in range(14):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        g = np.concatenate([p.grad.numpy().reshape(-1).copy() for p in model.parameters()])
        if step < 12:
            active = top(np.abs(g * w), 48)
            z = beta * z + decay * w + active * g
            expected = w - rate * z
        else:
            kept = top(np.abs(w), 48) if step == 12 else kept
            z = (beta * z + decay * w + g) * kept
            expected = (w - rate * z) * kept
        optimizer.step()
        w = np.concatenate([v.reshape(-1) for v in weights_of(model).values()])
        np.testing.assert_allclose(w, expected, rtol=1e-9, atol=1e-15)
    assert attached.sparsity == 0.75


# --- pruning at initialisation ----------------------------------------------------------------


def rounds_by_hand(model, batch, sparsity, rounds, returns):
    """Masks of iterative SNIP and FORCE, with weights and gradients written out."""
    start = weights_of(model)
    names, sizes = list(start), [w.size for w in start.values()]
    flat = np.concatenate([w.reshape(-1) for w in start.values()])
    mask = np.ones(len(flat), bool)
    for done in range(1, rounds + 1):
        with torch.no_grad():
            for name, part in zip(names, np.split(flat * mask, np.cumsum(sizes)[:-1]), strict=True):
                parameter = model.get_parameter(name)
                parameter.copy_(torch.from_numpy(part).reshape(parameter.shape))
        grads = torch.autograd.grad(loss(model, batch), list(model.parameters()))
        values = np.abs(flat * np.concatenate([g.numpy().reshape(-1) for g in grads]))
        if not returns:
            values = np.where(mask, values, -1.0)
        kept = mask.sum() / len(flat)
        target = kept * ((1 - sparsity) / kept) ** (1 / (rounds - done + 1))
        mask = top(values, round(target * len(flat)))
    return mask, flat


@pytest.mark.parametrize("returns", [False, True])
def test_iterative_snip_and_force_by_hand(returns):
    batch = data(8, 4)
    expected, flat = rounds_by_hand(mlp((8, 16, 4), 3), batch, 0.8, 5, returns)
    model = mlp((8, 16, 4), 3)
    method = (methods.force if returns else methods.iterative_snip)(0.8, rounds=5)
    masks = prune(model, method, batches=[batch], loss=loss)
    found = np.concatenate([m.numpy().reshape(-1) for m in masks.values()])
    # counts are rounded per site, so that a weight at the edge may differ
    assert (found != expected).sum() <= 2 * len(masks)
    left = np.concatenate([w.reshape(-1) for w in weights_of(model).values()])
    assert np.array_equal(left, flat * found)  # what returned has its initial value


def test_force_brings_weights_back():
    batch, model = data(8, 4), mlp((8, 16, 4), 4)
    method = methods.force(0.9, rounds=8)
    sites = [Site(n, tuple(p.shape)) for n, p in model.named_parameters()]
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = {n: v.clone() for n, v in w.items()}
    state, returned = method.init(sites, w, 0), 0
    while method.needs(state) is not None:
        outs = torch.func.functional_call(model, w, batch[0])
        for value in w.values():
            value.requires_grad_()
        outs = torch.func.functional_call(model, w, batch[0])
        grads = torch.autograd.grad(nn.functional.cross_entropy(outs, batch[1]), list(w.values()))
        signals = Signals({"gradient": dict(zip(w, grads, strict=True))})
        w = {n: v.detach() for n, v in w.items()}
        result = method.update(state, sites, w, signals)
        for name, mask in result.state.masks.items():
            old = state.masks.get(name)
            back = torch.zeros_like(mask) if old is None else mask & ~old
            returned += int(back.sum())
            w[name] = result.weights.get(name, w[name]) * mask
            assert torch.equal(w[name][mask], start[name][mask])
        state = result.state
    assert returned > 0


def test_a_training_step_has_no_fresh_gradient_for_every_round():
    model = mlp((8, 16, 4))
    with pytest.raises(SignalError, match=r"fresh gradient for every round.*pr\.prune"):
        train(model, methods.iterative_snip(0.9, rounds=3), 1, watch=lambda *_: None)


def deep(seed=0):
    """Twenty layers, wide at first and narrow later, as collapse wants it."""
    return mlp((64, *([128] * 10), *([24] * 9), 10), seed)


def layers_left(masks, model):
    return [int(masks[n].sum()) if n in masks else p.numel() for n, p in model.named_parameters()]


def test_at_999_of_1000_synflow_keeps_every_layer_alive_and_one_shot_methods_do_not():
    batch = data(64, 10, 128)
    left = {}
    for method in (
        methods.synflow(0.999),
        methods.snip(0.999),
        methods.grasp(0.999),
        methods.one_shot_magnitude(0.999),
    ):
        model = deep()
        masks = prune(model, method, inputs=batch[0], batches=[batch], loss=loss)
        left[method.name.partition("(")[0]] = layers_left(masks, model)
        if method.name.startswith("synflow"):
            # alive is more than not empty: the signal gets from the input to the output
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.abs_()
                assert float(model(torch.ones(1, 64).double()).sum()) > 0
    assert min(left["synflow"]) >= 1
    assert len(left["synflow"]) == 20
    assert min(left["snip"]) == 0  # collapses, as the paper of SynFlow shows
    assert min(left["grasp"]) == 0
    total = sum(p.numel() for p in deep().parameters())
    for counts in left.values():
        assert sum(counts) == pytest.approx(total / 1000, abs=10)


def test_snip_and_grasp_let_more_gradient_through_than_random():
    batch = data(16, 6, 256)

    def gradient_after(method):
        model = mlp((16, 64, 64, 6), 5)
        prune(model, method, batches=[batch], loss=loss)
        grads = torch.autograd.grad(loss(model, batch), list(model.parameters()))
        on = [p.detach() != 0 for p in model.parameters()]
        return sum(float((g * m).square().sum()) for g, m in zip(grads, on, strict=True))

    random = gradient_after(methods.random_pruning(0.9))
    assert gradient_after(methods.snip(0.9)) > 2 * random
    assert gradient_after(methods.grasp(0.9)) > 2 * random

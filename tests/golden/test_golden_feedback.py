"""Feedback, neural wirings and dynamic surgery in training: plain loops over a dense theta."""

from __future__ import annotations

import math

import pytest
import torch
from growth_case import SHAPES, SITES, draw, drive, model_and_data
from torch.nn import functional as F

from prunus import attach, methods, rng, structures
from prunus.errors import CompositionError, ValueRangeError
from prunus.kinds import RESERVE

NAMES = ("0.weight", "2.weight")


def top(theta, keep, together):
    """The largest |theta|, of each site (keep: a fraction) or of all sites together."""
    groups = [list(NAMES)] if together else [[name] for name in NAMES]
    masks = {}
    for group in groups:
        pool = torch.cat([theta[n].abs().reshape(-1) for n in group])
        chosen = torch.zeros(len(pool), dtype=torch.bool)
        order = pool.argsort(descending=True, stable=True)
        chosen[order[: round(keep * len(pool))]] = True
        for n in group:
            masks[n] = chosen[: theta[n].numel()].reshape(theta[n].shape)
            chosen = chosen[theta[n].numel() :]
    return masks


def optimizer_of(kind, parameters):
    if kind == "adam":
        return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def by_hand(kind, steps, choose):
    """Train theta: forward with m * theta, the optimizer steps theta by dL/d(m * theta).

    choose(step, theta, masks) -> (masks, final); before step 0 it acts before the forward pass,
    later on after the backward pass. Yields (step, theta, masks) after every step.
    """
    model, x, y = model_and_data()
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, masks, final = optimizer_of(kind, model.parameters()), None, False
    for step in range(steps):
        if step == 0:
            masks, final = choose(0, theta, None)
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(theta[n] * masks[n] if n in NAMES and masks else theta[n])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step and not final:
            masks, final = choose(step, theta, masks)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if final and n in NAMES:
                    theta[n] = theta[n] * masks[n]
                    p.grad.mul_(masks[n])
                    for value in optimizer.state[p].values():
                        if value.shape == p.shape:
                            value.mul_(masks[n])
                p.copy_(theta[n])
        optimizer.step()
        for n, p in model.named_parameters():
            theta[n] = p.detach().clone()
            if final and n in NAMES:
                theta[n] = theta[n] * masks[n]
        yield step, dict(theta), masks


def expect_equal(method, kind, steps, choose):
    model, x, y = model_and_data()
    optimizer = optimizer_of(kind, model.parameters())
    attached = attach(method, model, optimizer, seed=5)
    returned = 0
    before = None
    for step, theta, masks in by_hand(kind, steps, choose):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        hidden = attached.state.statistics.get(RESERVE, {})
        for n, p in model.named_parameters():
            expected = theta[n] * masks[n] if n in NAMES and masks else theta[n]
            torch.testing.assert_close(p.detach(), expected, msg=f"{n} at step {step}")
            if n in hidden:
                torch.testing.assert_close(
                    p.detach() + hidden[n], theta[n], msg=f"hidden {n} at step {step}"
                )
        for n in NAMES:
            found = attached.masks.get(n, torch.ones_like(theta[n], dtype=torch.bool))
            assert torch.equal(found, masks[n] if masks else torch.ones_like(found)), (n, step)
        if before is not None and masks is not None:
            returned += sum(int((masks[n] & ~before[n]).sum()) for n in NAMES)
        before = masks
    assert returned > 0, "nothing ever returned"
    assert not attached.state.statistics.get(RESERVE)
    return attached


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_feedback_is_a_loop_over_theta(kind):
    steps, every, end, s = 40, 3, 18, 0.7
    last = 39

    def choose(step, theta, masks):
        ramp = step <= end and step % every == 0
        if not ramp and not (step > end and step % every == 0):
            return masks, False
        sparsity = s if step >= end else s * (1 - (1 - step / end) ** 3)
        return top(theta, 1 - sparsity, together=True), step == last

    attached = expect_equal(
        methods.feedback(s, steps, every=every, end=end), kind, steps + 3, choose
    )
    assert attached.sparsity == pytest.approx(s, abs=0.01)
    assert attached.unfinished() is None


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_neural_wirings_are_a_loop_over_theta(kind):
    def choose(step, theta, masks):
        return top(theta, 0.3, together=False), step == 24

    attached = expect_equal(methods.neural_wirings(0.7, 25), kind, 28, choose)
    assert attached.sparsity == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_surgery_is_a_loop_over_theta(kind):
    steps, s, margin, gamma, power, seed = 40, 0.7, 0.2, 0.1, 1.5, 5
    between = 0

    def choose(step, theta, masks):
        nonlocal between
        if step == 30:
            return top(theta, 1 - s, together=False), True
        new = {}
        for n in NAMES:
            w = theta[n].abs()
            old = torch.ones_like(w, dtype=torch.bool) if masks is None else masks[n]
            new[n] = old.clone()
            if float(rng.uniform((seed, step, 0, n, "splice"), (1,))) >= (1 + gamma * step) ** (
                -power
            ):
                continue
            count = round((1 - s) * w.numel())
            q = float(w.reshape(-1).sort(descending=True).values[count - 1])
            for place in range(w.numel()):
                value = float(w.reshape(-1)[place])
                if value < (1 - margin) * q:
                    new[n].reshape(-1)[place] = False
                elif value >= (1 + margin) * q:
                    new[n].reshape(-1)[place] = True
                else:
                    between += 1
        return new, False

    method = methods.dynamic_surgery(s, steps, margin=margin, gamma=gamma, power=power)
    attached = expect_equal(method, kind, steps, choose)
    assert between > 0
    assert attached.sparsity == pytest.approx(s, abs=0.01)


def test_surgery_is_ever_rarer():
    method = methods.dynamic_surgery(0.5, 4000, gamma=0.01, power=1.0, end=3000, every=1)
    state = method.init(SITES, draw(0), 1)
    changes = []
    for step, old, new, _ in drive(method, 400, lambda t: draw(t)):
        if old is not None:
            changes.append((step, sum(bool((old[n] != new[n]).any()) for n in SHAPES)))
    del state
    early = sum(c for t, c in changes if t <= 50) / sum(3 for t, _ in changes if t <= 50)
    late = sum(c for t, c in changes if t > 350) / sum(3 for t, _ in changes if t > 350)
    expected = [sum(1 / (1 + 0.01 * t) for t in span) / len(span) for span in
                (range(1, 51), range(351, 400))]  # fmt: skip
    assert early == pytest.approx(expected[0], abs=0.12)
    assert late == pytest.approx(expected[1], abs=0.12)


def test_blocks_and_pairs_get_feedback_too():
    model, x, y = model_and_data()
    pairs = structures.n_of_m(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = methods.neural_wirings(0.5, 20, structure=pairs)
    attached = attach(method, model, optimizer)
    start = {n: m.clone() for n, m in attached.masks.items()}
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for mask in attached.masks.values():
        assert torch.equal(mask.reshape(-1, 2).sum(1), torch.ones(mask.numel() // 2).long())
    assert any(not torch.equal(start[n], attached.masks[n]) for n in start)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueRangeError, match="begin=5, end=3"):
        methods.feedback(0.5, 10, begin=5, end=3)
    with pytest.raises(ValueRangeError, match="begin <= end"):
        methods.dynamic_surgery(0.5, 10, begin=9, end=3)
    with pytest.raises(ValueRangeError, match="margin"):
        methods.dynamic_surgery(0.5, 10, margin=1.0)
    from prunus import allocations

    with pytest.raises(CompositionError, match="counts others"):
        methods.dynamic_surgery(0.5, 10, allocation=allocations.threshold(0.1))
    assert math.isclose(methods.feedback(0.5, 100).target or 0, 0.5)

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import allocations, methods, schedules, scores, sensitivity
from prunus.compose import compose
from prunus.drive import prune


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def test_every_site_is_pruned_alone_and_given_back():
    model, x = network(), torch.randn(32, 6).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        y = model(x)
    seen = []

    def evaluate():
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        seen.append(changed)
        return float((model(x) - y).square().mean())

    found = sensitivity(model, methods.one_shot_magnitude, evaluate, sparsities=[0.0, 0.5, 0.75])
    assert seen == [[], *[["0.weight"]] * 2, *[["2.weight"]] * 2]
    for name, table in found.items():
        assert table[0.0] == 0.0
        for sparsity in (0.5, 0.75):
            copy = network()
            prune(copy, methods.one_shot_magnitude(sparsity), include=name)
            with torch.no_grad():
                expected = float((copy(x) - y).square().mean())
            assert table[sparsity] == pytest.approx(expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    method = compose(
        scores.magnitude(),
        allocation=allocations.by_sensitivity(found),
        schedule=schedules.one_shot(0.6),
    )
    masks = prune(model, method)
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.6 * 72)


def test_an_error_gives_the_weights_back():
    model, calls = network(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of data")
        return 0.0

    with pytest.raises(RuntimeError, match="out of data"):
        sensitivity(model, methods.one_shot_magnitude, fails)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_methods_that_need_data_and_move_biases_leave_nothing_behind():
    model, x = network(), torch.randn(32, 6).double()
    x[:, 0] = 3  # its weights can be folded into the bias
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = []

    def evaluate():
        moved.append(
            [
                n
                for n, p in model.named_parameters()
                if "bias" in n and not torch.equal(p, before[n])
            ]
        )
        return 0.0

    found = sensitivity(
        model,
        methods.fold_constant,
        evaluate,
        sparsities=[0.5],
        batches=iter([x[:16], x[16:]]),
    )
    assert set(found) == {"0.weight", "2.weight"}
    assert moved == [[], ["0.bias"], ["2.bias"]]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

"""Layer collapse at 99.9% of a network of 20 layers: who keeps every layer, and who does not.

Theorem of Tanaka et al. 2020, arXiv 2006.05467: scores g w add up to the same in every layer, so
that weights of large layers score little each, and pruning by one threshold in one go removes the
largest layer first. SynFlow removes in many rounds, and what is left of a small layer then scores
high. GraSP and SNIP choose once, SNIP by |g w|, GraSP by w (H g) (Wang et al. 2020).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr

WIDTHS = [32] * 9 + [256, 256] + [32] * 9 + [10]


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip([32, *WIDTHS[:-1]], WIDTHS, strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
    return nn.Sequential(*layers[:-1])


def kept(method):
    model = deep()
    x, y = torch.randn(100, 32), torch.arange(100) % 10
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    masks = pr.prune(model, method, batches=[(x, y)], loss=loss, inputs=x)
    assert len(masks) == 21 - 1 + (len(masks) - 20)
    total = sum(mask.numel() for mask in masks.values())
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(counts.values()) == pytest.approx(0.001 * total, abs=1)
    return model, counts


def test_synflow_keeps_every_layer_and_a_path_from_end_to_end():
    model, counts = kept(pr.methods.synflow(0.999))
    assert len(counts) == len(WIDTHS)
    assert min(counts.values()) >= 1
    flow = torch.ones(1, 32)
    for layer in model:
        if isinstance(layer, nn.Linear):
            flow = flow @ layer.weight.detach().abs().T
    assert float(flow.sum()) > 0


def test_synflow_in_one_round_collapses_as_the_paper_says():
    _, counts = kept(pr.methods.synflow(0.999, rounds=1))
    assert min(counts.values()) == 0


@pytest.mark.parametrize("method", [pr.methods.snip, pr.methods.grasp])
def test_choosing_once_by_a_gradient_loses_the_largest_layer(method):
    model, counts = kept(method(0.999))
    sizes = {name: model.get_parameter(name).numel() for name in counts}
    assert counts[max(sizes, key=sizes.get)] == 0


def test_iterating_over_the_masked_network_keeps_more_layers_alive_than_choosing_once():
    _, once = kept(pr.methods.snip(0.999))
    _, rounds = kept(pr.methods.iterative_snip(0.999, rounds=60))
    dead = lambda counts: sum(count == 0 for count in counts.values())  # noqa: E731
    assert dead(rounds) < dead(once)

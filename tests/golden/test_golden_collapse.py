"""Layer collapse at 99.9% of a network of 20 layers: who keeps every layer, and who does not.

Theorem of Tanaka et al. 2020, arXiv 2006.05467: scores g w add up to the same in every layer, so
that weights of large layers score little each, and pruning by one threshold in one go removes the
largest layer first. SynFlow's scores are positive and it removes in many rounds, so that what is
left of a layer scores higher the less it is. SNIP and GraSP choose once; iterating SNIP does not
help, as the loss of a network that is nearly cut has hardly a gradient (section 6 there).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr

WIDTHS = [32] * 8 + [256, 256] + [32] * 9 + [10]


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
    total = sum(mask.numel() for mask in masks.values())
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sum(counts.values()) == pytest.approx(0.001 * total, abs=1)
    return model, counts


def reach(model):
    """What all paths of absolute weights from the inputs to the outputs add up to."""
    flow = torch.ones(1, 32, dtype=torch.float64)
    for layer in model:
        if isinstance(layer, nn.Linear):
            flow = flow @ layer.weight.detach().double().abs().T
    return flow.sum()


@pytest.mark.parametrize("rounds", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_synflow_keeps_every_layer_and_a_path_from_end_to_end(rounds):
    model, counts = kept(pr.methods.synflow(0.999, rounds=rounds))
    assert len(counts) == len(WIDTHS)
    assert min(counts.values()) >= 1
    assert float(reach(model)) > 0


def test_synflow_in_one_round_collapses_as_the_paper_says():
    _, counts = kept(pr.methods.synflow(0.999, rounds=1))
    assert min(counts.values()) == 0


@pytest.mark.parametrize("name", ["snip", "grasp", "iterative_snip"])
def test_what_goes_by_gradients_of_the_loss_cuts_the_network(name):
    model, counts = kept(getattr(pr.methods, name)(0.999))
    assert min(counts.values()) == 0
    assert float(reach(model)) == 0.0


def test_snip_empties_the_largest_layer():
    model, counts = kept(pr.methods.snip(0.999))
    sizes = {name: model.get_parameter(name).numel() for name in counts}
    assert counts[max(sizes, key=sizes.get)] == 0

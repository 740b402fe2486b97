"""Named methods are the parts that have golden tests, with the defaults that they document."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import allocations, methods, scores, solvers, structures

torch.manual_seed(11)
X = torch.randn(24, 6, dtype=torch.float64)
Y = torch.randint(0, 3, (24,))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second, self.other = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.other(self.second(x))))


def start():
    torch.manual_seed(2)
    model = Net().double()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.other.weight.uniform_(0.5, 1.5)
    return model


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


OUTPUTS = {"structure": structures.channel(0, "mean")}
EACH = OUTPUTS | {"allocation": allocations.floor(allocations.uniform())}
TOGETHER = OUTPUTS | {"allocation": allocations.floor(allocations.global_())}
COLUMNS = {
    "structure": structures.channel(1),
    "allocation": allocations.floor(allocations.uniform()),
}
ALL = {"allocation": allocations.global_()}
TABLE = {
    "apoz": (scores.apoz(), EACH),
    "batchnorm_scale": (scores.batchnorm_scale(), TOGETHER),
    "constant_output": (scores.constant_output(), EACH),
    "geometric_median": (scores.geometric_median(), EACH),
    "mean_activation": (scores.mean_activation(), EACH),
    "nisp": (scores.nisp(), EACH),
    "similarity": (scores.similarity(), EACH),
    "skeletonization": (scores.skeletonization(), TOGETHER),
    "taylor_filter": (scores.taylor_filter(), TOGETHER),
}
ONCE = {"allocation": allocations.uniform(), "structure": structures.element()}


def solved(solver, more=None):
    return scores.magnitude(), {**(ONCE if more is None else more), "solve": solver}


TABLE |= {
    "alps": solved(solvers.alps()),
    "channel_lasso": solved(solvers.channel_lasso(), COLUMNS),
    "exact_obc": solved(solvers.exact_obc()),
    "expander": (scores.expander(), {"structure": structures.fan_in()}),
    "greedy_forward": solved(solvers.greedy_forward(), COLUMNS),
    "lamp": (scores.magnitude(), {"allocation": allocations.lamp()}),
    "obd": (scores.obd(), ALL),
    "obs": (scores.obs(), ONCE | {"solve": solvers.obs()}),
    "sparsegpt": solved(solvers.sparsegpt()),
    "taylor": (scores.taylor(), ALL),
    "thinet": solved(solvers.thinet(), COLUMNS),
    "wanda": (scores.wanda(), {"structure": structures.fan_in()}),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_method_is_its_parts_with_the_documented_defaults(name):
    score, parts = TABLE[name]
    by_hand = pr.compose(score, schedule=pr.schedules.one_shot(0.5), **parts)
    given = {"inputs": X[:4], "batches": [(X, Y)], "loss": loss, "exclude": "last"}
    if name == "obs":  # a matrix of all weights of a layer
        given["exclude"] = ["last", "second"]
    model, twin = start(), start()
    before = copy.deepcopy(model.state_dict())
    found = pr.prune(model, getattr(methods, name)(0.5), **given)
    expected = pr.prune(twin, by_hand, **given)
    assert found.keys() == expected.keys()
    assert found
    for site, mask in found.items():
        assert torch.equal(mask, expected[site]), site
        assert torch.equal(model.get_parameter(site), twin.get_parameter(site)), site
        assert not torch.equal(model.get_parameter(site), before[site])
    kept = sum(int(mask.sum()) for mask in found.values())
    assert kept == pytest.approx(sum(m.numel() for m in found.values()) / 2, abs=8)

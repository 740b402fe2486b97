"""Neuron growth by bridging gradients, against sums over examples written out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import prunus as pr
from prunus.errors import AttachError, NotFiniteError, ShapeError, SiteError, ValueRangeError
from prunus.methods import grow_neurons


def make(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    between = [nn.BatchNorm1d(5)] if norm else []
    return nn.Sequential(nn.Linear(6, 5), *between, nn.ReLU(), nn.Linear(5, 4)).double()


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.rand(8, 6, generator=g).double() - 0.2, torch.randint(4, (8,), generator=g))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def bridging_by_hand(model: nn.Sequential) -> list[list[float]]:
    """-dL/du_j x_i, example by example: of cross entropy dL/du = (softmax(u) - onehot(y)) / n."""
    total = [[0.0] * 6 for _ in range(4)]
    for x, y in batches():
        for example, target in zip(x, y, strict=True):
            u = model(example[None])[0].tolist()
            high = max(u)
            e = [math.exp(v - high) for v in u]
            for j in range(4):
                d = (e[j] / sum(e) - (j == int(target))) / len(x)
                for i in range(6):
                    total[j][i] -= d * float(example[i]) / 3
    return total


def test_new_neurons_bridge_what_is_most_correlated():
    model = make()
    wanted, old = bridging_by_hand(model), copy.deepcopy(model)
    grown = grow_neurons(model, "0", "2", 2, batches=batches(), loss=loss, pairs=2, strength=0.5)
    order = sorted(
        ((abs(b), j, i) for j, row in enumerate(wanted) for i, b in enumerate(row)), reverse=True
    )
    # ranks 0 and 2 make the first neuron, 1 and 3 the second
    for neuron, ranks in enumerate(((0, 2), (1, 3))):
        for pair, rank in enumerate(ranks):
            _, j, i = order[rank]
            assert grown.connections[neuron, pair].tolist() == [j, i]
            assert float(grown.bridging[neuron, pair]) == pytest.approx(wanted[j][i], rel=1e-6)
        into, out = [0.0] * 6, [0.0] * 4
        for rank in ranks:
            size, j, i = order[rank]
            side = -1 if sum(float(x[:, i].sum()) for x, _ in batches()) < 0 else 1
            into[i] += side * math.sqrt(size)
            out[j] += side * math.copysign(math.sqrt(size), wanted[j][i])
        for new, layer, got in (
            (into, old[0], model[0].weight[5 + neuron]),
            (out, old[2], model[2].weight[:, 5 + neuron]),
        ):
            own = [abs(v) for v in new if v]
            factor = 0.5 * float(layer.weight.detach().abs().mean()) / (sum(own) / len(own))
            torch.testing.assert_close(got, torch.tensor([factor * v for v in new]).double())
    assert grown.places == range(5, 7)
    assert torch.equal(model[0].weight[:5], old[0].weight)
    assert torch.equal(model[2].weight[:, :5], old[2].weight)
    assert (model[0].out_features, model[2].in_features) == (7, 7)


def test_it_lowers_the_loss_where_random_neurons_do_not():
    fell, chance = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
        grown = grow_neurons(model, "0", "2", 3, batches=batches(), loss=loss)
        fell.append(grown.loss[1] - grown.loss[0])
        with torch.no_grad():  # as many connections of the same sizes, at random places and signs
            for w in (model[0].weight[5:], model[2].weight[:, 5:].T):
                size = w.abs().amax(1)
                w.zero_()
                w[torch.arange(3), torch.randint(w.shape[1], (3,))] = (
                    size * (torch.randint(2, (3,)) * 2 - 1).double()
                )
        chance.append(sum(float(loss(model, b).detach()) for b in batches()) / 3 - grown.loss[0])
    assert max(fell) < 0
    assert sum(fell) < sum(chance)


def test_batch_norm_moments_and_training_go_on():
    model = make(norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for batch in batches():
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    given = {"batches": batches(), "loss": loss, "optimizer": optimizer}
    grown = grow_neurons(model, "0", "3", 4, **given)
    assert model[1].num_features == 9
    assert torch.equal(model[1].running_mean[:5], buffers["1.running_mean"])
    now = optimizer.state[model[0].weight]["exp_avg"]
    assert torch.equal(now[:5], moments)
    assert not now[5:].any()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    last = grown.loss[1]
    for _ in range(20):
        for batch in batches():
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    assert float(loss(model.eval(), batches()[0]).detach()) < last
    assert model(torch.zeros(2, 6).double()).shape == (2, 4)
    pr.attach(pr.methods.gradual_magnitude(0.5, 10), model, optimizer).detach()


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"first": "1"}, SiteError, "a ReLU"),
        ({"first": "9"}, SiteError, "no module"),
        ({"second": "0"}, ShapeError, "reads 6 numbers"),
        ({"count": 0}, ValueRangeError, "at least 1"),
        ({"count": 30}, ValueRangeError, "24 between them"),
        ({"pairs": 1.5}, ValueRangeError, "whole numbers"),
        ({"strength": -1.0}, ValueRangeError, "strength"),
        ({"batches": []}, ValueRangeError, "empty"),
        ({"batches": [(torch.full((8, 6), math.nan).double(), torch.zeros(8).long())]},
         NotFiniteError, "holds NaN"),
    ],
)  # fmt: skip
def test_wrong_arguments_change_nothing(change, error, says):
    model = make()
    before = copy.deepcopy(model.state_dict())
    given = {"first": "0", "second": "2", "count": 2, "batches": batches(), "loss": loss} | change
    with pytest.raises(error, match=says):
        grow_neurons(model, **given)
    assert same(model, before)
    assert (model[0].out_features, model[2].in_features) == (5, 5)


def test_what_mixes_neurons_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 4)).double()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    given = {"batches": batches(), "loss": loss, "optimizer": optimizer}
    with pytest.raises(ShapeError, match="mixes neurons"):
        grow_neurons(model, "0", "2", 2, **given)
    assert same(model, before)
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


def test_attached_and_tied_models_are_refused():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached = pr.attach(pr.methods.gradual_magnitude(0.5, 10), model, optimizer)
    with pytest.raises(AttachError, match=r"before torch.compile, DDP and pr.attach"):
        grow_neurons(model, "0", "2", 1, batches=batches(), loss=loss)
    attached.detach()
    model.append(nn.Linear(6, 5))
    model[3].weight = model[0].weight
    with pytest.raises(SiteError, match="tied"):
        grow_neurons(model, "0", "2", 1, batches=batches(), loss=loss)


def test_frozen_networks_grow_too():
    model = make()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    grown = grow_neurons(model, "0", "2", 1, batches=batches(), loss=loss)
    assert grown.loss[1] < grown.loss[0]
    assert not any(p.requires_grad for p in model.parameters())

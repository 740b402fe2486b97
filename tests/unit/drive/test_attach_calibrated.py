"""Methods that read calibration data follow a schedule; training does not notice."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import prunus as pr
from prunus import allocations, schedules, scores, solvers
from prunus.errors import SignalError


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4)
    )


def examples(count: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 8, generator=g), torch.randint(0, 4, (6,), generator=g))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, first: int, last: int) -> None:
    for x, y in examples(last, seed=9)[first:]:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def cubic(score, solve=None):
    return pr.compose(
        score,
        schedule=schedules.cubic(0.8, 0, 6, every=2),
        allocation=allocations.global_() if solve else None,
        solve=solve,
    )


METHODS = {
    "wanda": lambda: cubic(scores.wanda()),
    "woodfisher": lambda: cubic(scores.block_fisher(), solvers.block_fisher()),
    "grasp": lambda: cubic(scores.grasp()),
    "taylor_filter": lambda: cubic(scores.taylor_filter()),
    "sparsegpt": lambda: pr.methods.sparsegpt(0.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_calibrated_methods_reach_their_target_while_training(name):
    model, method = network(), METHODS[name]()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    attached = pr.attach(method, model, optimizer, batches=examples(), loss=loss)
    seen = []
    for step in range(8):
        train(model, optimizer, step, step + 1)
        seen.append(attached.sparsity)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(method.target, abs=2 / 144)
    assert attached.unfinished() is None


def test_a_schedule_scores_with_the_data_it_was_given():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    column = torch.tensor([1e6, *[1e-6] * 7])  # only input 0 of the first layer matters
    method = pr.compose(scores.wanda(), schedule=schedules.one_shot(0.875, step=2))
    attached = pr.attach(method, model, optimizer, include="0", batches=[column.expand(5, 8)])
    train(model, optimizer, 0, 3)
    expected = torch.zeros(12, 8, dtype=torch.bool)
    expected[:, 0] = True
    assert torch.equal(attached.masks["0.weight"], expected)


def test_a_run_does_not_notice_that_signals_were_collected():
    """A method that reads data and prunes nothing trains as no method does: bit for bit."""

    class Loader:
        def __iter__(self):
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002 - the global state is what is tested
            return iter(examples())

    def noisy(model, batch):
        model.train()
        value = loss(model, batch)
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        return value

    method = pr.compose(scores.grasp(), schedule=schedules.cubic(0.0, 0, 8, every=1))
    ends = []
    for active in (False, True):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        if active:
            pr.attach(method, model, optimizer, batches=Loader(), loss=noisy)
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002 - the global state is what is tested
        grads = []
        for step in range(8):
            train(model, optimizer, step, step + 1)
            grads.append([p.grad.clone() for p in model.parameters()])
        modes = [m.training for m in model.modules()]
        draws = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002 - the global state is what is tested
        state = optimizer.state_dict()["state"]
        ends.append((model.state_dict(), grads, modes, draws, state))
    plain, watched = ends
    for name, value in plain[0].items():
        assert torch.equal(value, watched[0][name]), name
    assert all(
        torch.equal(a, b)
        for x, y in zip(plain[1], watched[1], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert plain[2:4] == watched[2:4]
    for place, values in plain[4].items():
        assert all(torch.equal(v, watched[4][place][k]) for k, v in values.items())


def test_resume_is_bit_for_bit():
    def start():
        model = network()
        return model, torch.optim.Adam(model.parameters(), 0.01)

    def attach(model, optimizer):
        return pr.attach(METHODS["woodfisher"](), model, optimizer, batches=examples(), loss=loss)

    model, optimizer = start()
    attach(model, optimizer)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    train(model, optimizer, 3, 8)
    again, resumed = start()
    again.load_state_dict(saved[0][0])
    resumed.load_state_dict(saved[0][1])
    attached = attach(again, resumed)
    torch.set_rng_state(saved[1])
    train(again, resumed, 3, 8)
    assert attached.sparsity > 0.5
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_an_iterator_is_kept_and_a_loader_iterated_at_each_update():
    class Loader:
        passes = 0

        def __iter__(self):
            Loader.passes += 1
            return iter([b[0] for b in examples()])

    for batches in (Loader(), (b[0] for b in examples())):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        attached = pr.attach(METHODS["wanda"](), model, optimizer, batches=batches)
        train(model, optimizer, 0, 8)
        assert attached.sparsity == pytest.approx(0.8, abs=0.02)
    assert Loader.passes == 4  # steps 0, 2, 4, 6


def test_one_batch_is_not_a_list_of_batches():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.raises(SignalError, match=r"batches=\[batch\].*loss="):
        pr.attach(METHODS["wanda"](), model, optimizer, batches=examples()[0])

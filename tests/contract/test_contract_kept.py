"""What `attach` keeps: zeros under any optimizer and closure, moments at zero, bits on resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import methods

STEPS = 24


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24, bias=False), nn.Tanh(), nn.Linear(24, 5, bias=False))


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 12, generator=generator)
    y = torch.randint(0, 5, (16,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def train(model, opt, start, stop, after=lambda step: None):
    for step in range(start, stop):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()
        after(step)


def check_zeros(attached):
    for name, mask in attached.masks.items():
        assert not attached.parameters[name].detach()[~mask].any(), name


class Noise(torch.optim.SGD):
    """Writes everywhere, whatever the gradient: what is off is zero only if it is made so."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        return loss


WRITERS = {
    "noise": lambda p: Noise(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(
        p, 1e-2, weight_decay=0.1, initial_accumulator_value=1
    ),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2, decoupled_weight_decay=True, weight_decay=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
}
if hasattr(torch.optim, "Adafactor"):  # its moments are not shaped like the weight
    WRITERS["adafactor"] = lambda p: torch.optim.Adafactor(p, 1e-2)
if hasattr(torch.optim, "Muon"):  # orthogonalises the step, so that it reaches what is off
    WRITERS["muon"] = lambda p: torch.optim.Muon(p, 1e-2)


@pytest.mark.parametrize("method", ["gradual", "rigl"])
@pytest.mark.parametrize("writer", WRITERS)
def test_zeros_stay_whatever_the_optimizer_writes(writer, method):
    make = {"gradual": methods.gradual_magnitude, "rigl": methods.rigl}[method]
    model = network()
    opt = WRITERS[writer](model.parameters())
    attached = pr.attach(make(0.8, STEPS, every=2), model, opt)
    train(model, opt, 0, STEPS, lambda step: check_zeros(attached))
    assert attached.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("keyword", [False, True])
def test_lbfgs_calls_its_closure_many_times_and_updates_once(keyword, search):
    model = network()
    opt = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=4, line_search_fn=search)
    attached = pr.attach(methods.rigl(0.8, STEPS, every=2), model, opt)
    for step in range(STEPS):

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        loss = opt.step(closure=closure) if keyword else opt.step(closure)
        assert loss.detach() > 0
        check_zeros(attached)
    assert attached.state.step == STEPS


@pytest.mark.parametrize("keyword", [False, True])
def test_a_step_with_a_closure_is_the_step_of_a_plain_loop(keyword):
    def begin():
        model = network()
        opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, opt, pr.attach(methods.rigl(0.8, STEPS, every=3), model, opt)

    plain, plain_opt, _ = begin()
    train(plain, plain_opt, 0, STEPS)
    model, opt, _ = begin()
    for step in range(STEPS):

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        opt.step(closure=closure) if keyword else opt.step(closure)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_of_a_dense_checkpoint_are_cleared_where_weights_are_off(make):
    dense = network()
    opt = make(dense.parameters(), 1e-2)
    train(dense, opt, 0, 4)
    model = network()
    sparse_opt = make(model.parameters(), 1e-2)
    attached = pr.attach(methods.one_shot_magnitude(0.5), model, sparse_opt)
    sparse_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    for name, mask in attached.masks.items():
        moments = sparse_opt.state[attached.parameters[name]]
        for kind in ("exp_avg", "exp_avg_sq"):
            assert not moments[kind][~mask].any()
            assert moments[kind][mask].all()


REMEMBERING = {
    "sparse_momentum": lambda: methods.sparse_momentum(0.8, STEPS, every=5),
    "top_kast": lambda: methods.top_kast(0.8, STEPS),
}


@pytest.mark.parametrize("stop", [3, 11])
@pytest.mark.parametrize("method", REMEMBERING)
def test_what_a_method_remembers_is_in_the_optimizer_state(method, stop):
    def begin(seed=0):
        model = network(seed)
        opt = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, opt, pr.attach(REMEMBERING[method](), model, opt, seed=1)

    whole, whole_opt, _ = begin()
    train(whole, whole_opt, 0, STEPS)
    first, first_opt, before = begin()
    train(first, first_opt, 0, stop)
    assert before.state.statistics
    second, second_opt, after = begin(seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second_opt.load_state_dict(copy.deepcopy(first_opt.state_dict()))
    train(second, second_opt, stop, STEPS)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert after.state.step == STEPS


def test_a_method_keeps_on_after_the_model_changes_its_dtype():
    model = network()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    attached = pr.attach(methods.gradual_magnitude(0.8, STEPS, every=2), model, opt)
    train(model, opt, 0, 6)
    model.to(torch.float64)
    for _ in range(6, STEPS):
        opt.zero_grad()
        model(torch.randn(4, 12, dtype=torch.float64)).square().mean().backward()
        opt.step()
        check_zeros(attached)
    assert attached.sparsity == pytest.approx(0.8, abs=0.01)


def test_groups_that_are_added_later_and_weights_that_are_frozen_later_do_no_harm():
    model = network()
    opt = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
    attached = pr.attach(methods.gradual_magnitude(0.8, STEPS, every=2), model[0], opt)
    opt.add_param_group({"params": list(model[2].parameters()), "weight_decay": 0.1})
    train(model, opt, 0, 12, lambda step: check_zeros(attached))
    model[0].requires_grad_(False)
    train(model, opt, 12, STEPS, lambda step: check_zeros(attached))
    assert attached.unfinished() is None
    assert bool(model[2].weight.all())
    opt.load_state_dict(opt.state_dict())
    assert attached.sparsity == pytest.approx(0.8, abs=0.01)

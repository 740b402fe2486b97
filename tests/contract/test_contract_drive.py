"""What `attach` promises, each promise a test, over every method and optimizer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from drive_case import METHODS, OPTIMIZERS, STEPS, begin, check_off_is_zero, loss_of, net, train
from torch import nn

import prunus as pr


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["gradual", "rigl"])
def test_off_stays_zero_under_every_optimizer(method, optimizer):
    model, opt, attached = begin(method, optimizer)
    train(model, opt, 0, STEPS, lambda step: check_off_is_zero(model, attached))
    assert attached.sparsity > 0.75


@pytest.mark.parametrize("method", METHODS)
def test_off_stays_zero_and_moments_too(method):
    model, opt, attached = begin(method, "adam")

    def check(step):
        check_off_is_zero(model, attached)
        parameters = dict(model.named_parameters())
        for name, mask in attached.masks.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                assert not opt.state[parameters[name]][kind][~mask].any()

    train(model, opt, 0, STEPS, check)
    assert attached.sparsity > 0.4
    assert attached.unfinished() is None


def test_clipping_and_grad_scaler_keep_zeros():
    model, opt, attached = begin("gradual", "adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(STEPS):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        check_off_is_zero(model, attached)
    assert attached.state.step == STEPS


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_fused"])
def test_a_step_that_the_scaler_skips_does_not_count(optimizer):
    model, opt, attached = begin("gradual", optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(8):
        opt.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 5:
            model.hidden.weight.grad[0, 0] = float("inf")
        before = model.hidden.weight.detach().clone()
        scaler.step(opt)
        scaler.update()
        if step == 5:
            assert torch.equal(before, model.hidden.weight)
    assert attached.state.step == 7
    check_off_is_zero(model, attached)


def test_asked_is_reached_at_every_step():
    model, opt, attached = begin("gradual")
    schedule = pr.schedules.cubic(0.9, STEPS // 10, STEPS * 3 // 4, 2)
    total = sum(site.size for site in attached.sites)
    asked = 0.0

    def check(step):
        nonlocal asked
        now = schedule.at(step)
        asked = asked if now is None else now
        zeros = sum(int((~mask).sum()) for mask in attached.masks.values())
        assert abs(zeros - asked * total) <= 1, step
        assert attached.sparsity == zeros / total

    train(model, opt, 0, STEPS, check)
    assert attached.sparsity == pytest.approx(0.9, abs=1 / total)


@pytest.mark.parametrize("stop", [0, 1, 7, 13, STEPS - 1])
@pytest.mark.parametrize("method", ["gradual", "rigl", "set", "combined", "sequence", "snip"])
def test_resume_is_bit_for_bit(method, stop):
    model, opt, attached = begin(method, "adamw")
    train(model, opt, 0, STEPS)

    first, first_opt, _ = begin(method, "adamw")
    train(first, first_opt, 0, stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": first_opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second, second_opt, resumed = begin(method, "adamw", seed=9)
    second.load_state_dict(saved["model"])
    second_opt.load_state_dict(saved["optimizer"])
    assert resumed.state.step == stop
    train(second, second_opt, stop, STEPS)
    for (name, a), b in zip(model.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.masks.keys() == attached.masks.keys()
    assert all(torch.equal(resumed.masks[n], attached.masks[n]) for n in attached.masks)


def test_a_state_loaded_before_attaching_is_taken_up():
    model, opt, _ = begin("rigl")
    train(model, opt, 0, 10)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, 10, STEPS)

    other = net(5)
    other_opt = OPTIMIZERS["sgd"](other.parameters())
    other.load_state_dict(saved[0])
    other_opt.load_state_dict(saved[1])
    attached = pr.attach(METHODS["rigl"](), other, other_opt)
    assert attached.state.step == 10
    train(other, other_opt, 10, STEPS)
    assert torch.equal(model.hidden.weight, other.hidden.weight)

"""What `attach` promises about growth, its end, its errors and letting go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from drive_case import METHODS, OPTIMIZERS, STEPS, begin, loss_of, net, train
from torch import nn

import prunus as pr
from prunus import methods
from prunus.errors import AttachError, SignalError, TargetError


def test_growth_moves_exactly_as_many_and_none_just_dropped():
    for method in ("set", "rigl"):
        model, opt, attached = begin(method, "adam")
        before = {name: mask.clone() for name, mask in attached.masks.items()}
        moved = 0
        for step in range(STEPS):
            opt.zero_grad()
            loss_of(model, step).backward()
            opt.step()
            for name, mask in attached.masks.items():
                grown, dropped = mask & ~before[name], before[name] & ~mask
                assert int(grown.sum()) == int(dropped.sum())
                moved += int(grown.sum())
                parameter = model.get_parameter(name)
                assert not parameter[grown].any(), "new weights start at zero"
                assert not opt.state[parameter]["exp_avg"][grown].any()
                assert not opt.state[parameter]["exp_avg_sq"][grown].any()
                before[name] = mask.clone()
        assert moved > 0


def test_rigl_asks_for_the_dense_gradient_only_at_its_moves():
    sparsifier = methods.rigl(0.8, 40, every=5)
    model = net()
    opt = OPTIMIZERS["sgd"](model.parameters())
    attached = pr.attach(sparsifier, model, opt)
    asked = []
    for step in range(40):
        due = sparsifier.needs(attached.state)
        if due is not None:
            asked.append((step, due))
        train(model, opt, step, step + 1)
    assert asked == [(s, frozenset({"gradient"})) for s in range(5, 30, 5)]


def test_unfinished_says_what_is_owed():
    model, opt, attached = begin("gradual")
    train(model, opt, 0, 5)
    sentence = attached.unfinished()
    assert sentence is not None
    assert "step 18" in sentence
    assert "0.9" in sentence
    assert pr.attached(model) is attached
    train(model, opt, 5, STEPS)
    assert attached.unfinished() is None


def test_errors_say_what_to_do():
    model, opt, _ = begin("gradual")
    with pytest.raises(AttachError, match=r"already attached.*detach\(\)"):
        pr.attach(METHODS["random"](), model, opt)
    with pytest.raises(AttachError, match="gradual_magnitude"):
        pr.attach("magnitude", model, opt)  # pyright: ignore[reportArgumentType]
    other = net()
    with pytest.raises(AttachError, match="none of the prunable weights"):
        pr.attach(METHODS["random"](), other, opt)
    part = torch.optim.SGD([*other.hidden.parameters()], 0.1)
    with pytest.raises(AttachError, match=r"conv\.weight, out\.weight.*exclude="):
        pr.attach(METHODS["random"](), other, part)
    with pytest.raises(SignalError, match="inputs="):
        pr.attach(METHODS["synflow"](), other, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(TargetError, match="nothing to keep"):
        pr.attach(methods.fixed(), other, torch.optim.SGD(other.parameters(), 0.1))


def test_a_failed_attach_leaves_nothing_behind():
    model = net()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(SignalError):
        pr.attach(METHODS["synflow"](), model, opt)
    assert pr.attached(model) is None
    attached = pr.attach(METHODS["random"](), model, opt)
    assert attached.sparsity == pytest.approx(0.5, abs=0.01)


def test_frozen_weights_are_left_alone():
    model = net()
    model.hidden.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    attached = pr.attach(METHODS["random"](), model, opt)
    assert [site.name for site in attached.sites] == ["conv.weight", "out.weight"]


def test_detach_lets_go_and_a_new_optimizer_may_follow():
    model, opt, attached = begin("random")
    attached.detach()
    train(model, opt, 0, 2)
    assert int((model.conv.weight == 0).sum()) == 0
    assert pr.attached(model) is None
    pr.attach(METHODS["random"](), model, opt)
    reference = weakref.ref(opt)
    del opt, attached
    gc.collect()
    assert reference() is None, "nothing of prunus keeps an optimizer alive"
    pr.attach(METHODS["gradual"](), model, torch.optim.SGD(model.parameters(), 0.1))


def test_fixed_keeps_the_zeros_that_are_there():
    model, opt, attached = begin("one_shot")
    train(model, opt, 0, 10)
    zeros = {n: p == 0 for n, p in model.named_parameters() if n.endswith("weight") and p.ndim > 1}
    attached.detach()
    again = torch.optim.AdamW(model.parameters(), 1e-2)
    pr.attach(methods.fixed(), model, again)
    train(model, again, 0, 5)
    for name, where in zeros.items():
        assert torch.equal(model.get_parameter(name) == 0, where)


def test_a_checkpoint_of_another_model_is_refused():
    _, opt, _ = begin("random")
    saved = opt.state_dict()
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    other = torch.optim.SGD(model.parameters(), 0.1)
    pr.attach(METHODS["random"](), model, other)
    saved["param_groups"][0]["params"] = other.state_dict()["param_groups"][0]["params"]
    saved["state"] = {}
    with pytest.raises(AttachError, match=r"conv\.weight.*no site here"):
        other.load_state_dict(saved)

"""Methods that train what is off: zeros outside of a step, resuming, copies, the end."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from drive_case import OPTIMIZERS, STEPS, batch, check_off_is_zero, loss_of, net, train

import prunus as pr
from prunus import methods
from prunus.kinds import RESERVE

METHODS = {
    "feedback": lambda: methods.feedback(0.8, STEPS - 3, every=3),
    "neural_wirings": lambda: methods.neural_wirings(0.8, STEPS - 3),
    "dynamic_surgery": lambda: methods.dynamic_surgery(0.8, STEPS, gamma=0.05),
    "top_kast": lambda: methods.top_kast(0.8, STEPS, every=2),
}
ENDING = [name for name in METHODS if name != "top_kast"]


def begin(method, optimizer="sgd", seed=0):
    model = net(seed)
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, pr.attach(METHODS[method](), model, opt, inputs=batch(0)[0], seed=3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_off_is_zero_after_every_step_and_returns_with_a_value(method, optimizer):
    model, opt, attached = begin(method, optimizer)
    before, returned = dict(attached.masks), 0

    def check(step):
        nonlocal before, returned
        check_off_is_zero(model, attached)
        for name, mask in attached.masks.items():
            back = mask & ~before.get(name, mask)
            returned += int(model.get_parameter(name)[back].count_nonzero())
        before = dict(attached.masks)

    train(model, opt, 0, STEPS, check)
    assert attached.sparsity == pytest.approx(0.8, abs=0.01)
    assert returned > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("stop", [1, 7, 16, STEPS - 1])
@pytest.mark.parametrize("method", METHODS)
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
    train(second, second_opt, stop, STEPS)
    for (name, a), b in zip(model.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(resumed.masks[n], attached.masks[n]) for n in attached.masks)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_alone(method):
    model, opt, attached = begin(method, "adamw")
    train(model, opt, 0, 9)
    twin = copy.deepcopy(attached)
    train(model, opt, 9, STEPS)
    train(twin.model, twin.optimizer, 9, STEPS)
    for a, b in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_closures_and_accumulation_see_the_masked_network(method):
    plain, plain_opt, _ = begin(method)
    train(plain, plain_opt, 0, STEPS)
    model, opt, attached = begin(method)
    for step in range(STEPS):

        def closure(step=step):
            opt.zero_grad()
            check_off_is_zero(model, attached)
            for _ in range(2):
                (loss_of(model, step) / 2).backward()
            return loss_of(model, step)

        opt.step(closure)
        check_off_is_zero(model, attached)
    # batch norm saw every batch three times, so that only its statistics may differ
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ENDING)
def test_after_the_last_update_nothing_is_held_and_moments_are_zero(method):
    model, opt, attached = begin(method, "adam")
    train(model, opt, 0, STEPS)
    assert RESERVE not in attached.state.statistics
    assert not attached.state.trained
    for name, mask in attached.masks.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            assert not opt.state[model.get_parameter(name)][kind][~mask].any()


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_gradient_reaches_what_is_off(method):
    model, opt, attached = begin(method)
    train(model, opt, 0, 12)
    before = {n: v.clone() for n, v in attached.state.statistics[RESERVE].items()}
    masks = dict(attached.masks)
    train(model, opt, 12, 13)
    for name, hidden in attached.state.statistics[RESERVE].items():
        off = ~masks[name] & ~attached.masks[name]
        moved = (hidden != before[name])[off]
        assert moved.float().mean() > (0.1 if method == "top_kast" else 0.95)

"""What `attach` promises, each promise a test, over every method and optimizer."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import methods
from prunus.errors import AttachError, SignalError, TargetError

STEPS = 24


class Net(nn.Module):
    """A convolution, a norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 6 * 6, 24)
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1))))


METHODS = {
    "one_shot": lambda: methods.one_shot_magnitude(0.8, step=5),
    "gradual": lambda: methods.gradual_magnitude(0.9, STEPS, every=2),
    "gradual_global": lambda: methods.gradual_magnitude(
        0.9, STEPS, allocation=pr.allocations.floor(pr.allocations.global_())
    ),
    "random": lambda: methods.random_pruning(0.5),
    "snip": lambda: methods.snip(0.8),
    "synflow": lambda: methods.synflow(0.8, rounds=7),
    "set": lambda: methods.set_(0.8, STEPS, every=3),
    "rigl": lambda: methods.rigl(0.8, STEPS, every=3),
    "block": lambda: methods.one_shot_magnitude(
        0.5, structure=pr.structures.channel(), allocation=pr.allocations.uniform()
    ),
    "combined": lambda: pr.combine.by_site(
        {"conv": methods.one_shot_magnitude(0.5, step=2), "*": methods.rigl(0.8, STEPS, every=4)}
    ),
    "sequence": lambda: pr.combine.then(
        methods.gradual_magnitude(0.6, 8, every=1), 10, methods.one_shot_magnitude(0.8)
    ),
}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
}


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 5, (16,), generator=generator)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def loss_of(model, step):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def train(model, optimizer, start, stop, after=lambda step: None):
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after(step)


def begin(method="gradual", optimizer="sgd", seed=0):
    model = net(seed)
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, pr.attach(METHODS[method](), model, opt, inputs=batch(0)[0], seed=3)


def check_off_is_zero(model, attached):
    parameters = dict(model.named_parameters())
    for name, mask in attached.masks.items():
        values = parameters[name].detach()[~mask]
        assert torch.equal(values, torch.zeros_like(values)), name


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


def test_names_and_sizes_of_the_model_stay():
    plain = {name: value.shape for name, value in net().state_dict().items()}
    model, opt, _ = begin("gradual")
    identities = [id(p) for p in model.parameters()]
    train(model, opt, 0, STEPS)
    assert {name: value.shape for name, value in model.state_dict().items()} == plain
    assert [id(p) for p in model.parameters()] == identities


def test_a_dense_checkpoint_loads_into_an_attached_optimizer():
    dense = net()
    dense_opt = OPTIMIZERS["adam"](dense.parameters())
    train(dense, dense_opt, 0, 4)
    model, opt, attached = begin("random", "adam")
    opt.load_state_dict(dense_opt.state_dict())
    train(model, opt, 0, 3, lambda step: check_off_is_zero(model, attached))
    assert attached.sparsity == pytest.approx(0.5, abs=0.01)


def test_deepcopy_of_the_model_and_of_the_whole():
    model, opt, attached = begin("rigl", "adamw")
    train(model, opt, 0, 5)
    alone = copy.deepcopy(model)
    assert torch.equal(alone.hidden.weight, model.hidden.weight)
    twin = copy.deepcopy(attached)
    assert twin.model is not model
    train(model, opt, 5, STEPS)
    train(twin.model, twin.optimizer, 5, STEPS)
    for a, b in zip(model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)
    check_off_is_zero(twin.model, twin)


def test_tied_weights_are_pruned_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.body = nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.body(self.embed(ids))))

    model = Tied()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    attached = pr.attach(methods.one_shot_magnitude(0.5), model, opt)
    assert [(s.name, s.aliases) for s in attached.sites] == [
        ("embed.weight", ("head.weight",)),
        ("body.weight", ()),
    ]
    ids = torch.arange(20)
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(ids), ids).backward()
        opt.step()
    assert model.head.weight is model.embed.weight
    assert int((model.embed.weight == 0).sum()) == 80


def test_a_compiled_model_trains():
    model = net()
    compiled = torch.compile(model, backend="aot_eager")
    opt = OPTIMIZERS["adamw"](compiled.parameters())
    attached = pr.attach(METHODS["gradual"](), compiled, opt)
    assert [site.name for site in attached.sites] == ["conv.weight", "hidden.weight", "out.weight"]
    train(compiled, opt, 0, STEPS, lambda step: check_off_is_zero(model, attached))

    plain, plain_opt, _ = begin("gradual", "adamw")
    train(plain, plain_opt, 0, STEPS)
    assert torch.allclose(plain.out.weight, model.out.weight, atol=1e-4)


def test_a_loop_that_only_calls_step_with_a_closure():
    model, opt, attached = begin("rigl")
    for step in range(STEPS):

        def closure(step=step):
            opt.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert opt.step(closure) is not None
        check_off_is_zero(model, attached)
    plain, plain_opt, _ = begin("rigl")
    train(plain, plain_opt, 0, STEPS)
    assert torch.equal(plain.hidden.weight, model.hidden.weight)


def test_schedulers_and_accumulation_need_nothing_more():
    model, opt, attached = begin("gradual", "adamw")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    for step in range(STEPS):
        for part in range(2):
            (loss_of(model, 2 * step + part) / 2).backward()
        opt.step()
        scheduler.step()
        opt.zero_grad()
        check_off_is_zero(model, attached)
    assert attached.unfinished() is None


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

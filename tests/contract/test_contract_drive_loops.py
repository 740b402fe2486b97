"""What `attach` promises for models and training loops of other kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from drive_case import METHODS, OPTIMIZERS, STEPS, begin, check_off_is_zero, loss_of, net, train
from torch import nn

import prunus as pr
from prunus import methods


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

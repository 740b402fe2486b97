"""What `attach` and `prune` refuse, and what they warn of, as a first-time user meets it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import prunus as pr
from prunus import methods
from prunus.errors import AttachError, PrunusError, SiteError, ValueRangeError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def train(model, step, steps=3):
    for i in range(steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i))
        model.zero_grad()
        model(x).square().mean().backward()
        step()


def test_swapped_and_wrong_arguments_name_the_order():
    model, method = network(), methods.one_shot_magnitude(0.5)
    opt = sgd(model)
    for arguments in ((model, method, opt), (model, opt, method), (method, [model], opt)):
        with pytest.raises(AttachError, match=r"pr\.attach\(method, model, optimizer\)"):
            pr.attach(*arguments)
    with pytest.raises(AttachError, match="got str"):
        pr.attach(method, model, "adam")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttachError, match=r"pr\.prune\(model, method\)"):
        pr.prune(method, model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AttachError, match="whole number"):
        pr.attach(method, model, opt, seed="a")  # pyright: ignore[reportArgumentType]
    assert pr.attached(model) is None
    assert pr.attach(method, model, opt, seed=np.int64(3)).sparsity == 0.5  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("sparsity", ["0.9", None, 1.2, 95, -0.1, float("nan"), [0.9], 1j])
def test_a_sparsity_that_is_no_fraction_is_refused(sparsity):
    with pytest.raises(ValueRangeError, match="between 0 and 1"):
        methods.one_shot_magnitude(sparsity)


def test_one_optimizer_holds_one_sparsifier():
    first, second = network(), network(1)
    opt = torch.optim.Adam([*first.parameters(), *second.parameters()])
    pr.attach(methods.one_shot_magnitude(0.5), first, opt)
    with pytest.raises(AttachError, match=r"this optimizer.*ModuleList"):
        pr.attach(methods.one_shot_magnitude(0.75), second, opt)
    assert pr.attached(second) is None
    first_state = opt.state_dict()
    opt.load_state_dict(first_state)
    attached = pr.attached(first)
    assert attached is not None
    assert attached.sparsity == 0.5
    attached.detach()
    both = pr.attach(methods.one_shot_magnitude(0.75), nn.ModuleList([first, second]), opt)
    assert both.sparsity == 0.75
    assert len(both.sites) == 4


def test_a_weight_has_one_sparsifier_even_as_part_of_another_module():
    model = network()
    opt, other = sgd(model), sgd(model)
    pr.attach(methods.one_shot_magnitude(0.5), model[2], opt)
    with pytest.raises(AttachError, match=r"already prunes 2\.weight.*exclude="):
        pr.attach(methods.one_shot_magnitude(0.75), model, other)
    rest = pr.attach(methods.one_shot_magnitude(0.75), model, other, exclude="2.weight")
    assert rest.site_sparsity() == {"0.weight": 0.75}


class Uninitialised(torch.optim.Optimizer):
    """As Accelerate's: a subclass that never runs Optimizer.__init__."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Foreign:
    """As Lightning's: no optimizer at all, but it holds one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure=closure)


@pytest.mark.parametrize("wrap", [Uninitialised, Foreign, lambda o: Foreign(Uninitialised(o))])
def test_the_optimizer_inside_a_wrapper_is_found(wrap):
    model = network()
    inner = sgd(model)
    wrapper = wrap(inner)
    attached = pr.attach(methods.gradual_magnitude(0.75, 8), model, wrapper)
    assert attached.optimizer is inner
    train(model, wrapper.step, 8)
    assert attached.state.step == 8
    assert int((model[0].weight == 0).sum()) == 96


def test_a_real_optimizer_that_holds_another_is_itself_attached_to():
    class Outer(torch.optim.SGD):
        def __init__(self, model):
            super().__init__(model.parameters(), 0.1)
            self.optimizer = sgd(model)

    model = network()
    outer = Outer(model)
    assert pr.attach(methods.one_shot_magnitude(0.5), model, outer).optimizer is outer


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    pr.attach(methods.one_shot_magnitude(0.5), model, opt, include=["0.weight", "2.weight"])
    model(torch.arange(6).reshape(2, 3)).sum().backward()
    with pytest.raises(AttachError, match=r"'0\.weight' is sparse.*sparse=False"):
        opt.step()


def test_weights_on_the_meta_device_are_refused():
    model = network().to("meta")
    with pytest.raises(SiteError, match=r"0\.weight, 2\.weight have no data.*to_empty"):
        pr.attach(methods.one_shot_magnitude(0.5), model, sgd(model))
    with pytest.raises(SiteError, match="meta"):
        pr.prune(model, methods.one_shot_magnitude(0.5))


def test_prune_leaves_an_attached_model_alone():
    model = network()
    opt = sgd(model)
    attached = pr.attach(methods.one_shot_magnitude(0.5), model, opt)
    before = model[0].weight.detach().clone()
    with pytest.raises(AttachError, match=r"one_shot_magnitude.*detach\(\)"):
        pr.prune(model, methods.one_shot_magnitude(0.75))
    assert torch.equal(before, model[0].weight)
    attached.detach()
    pr.prune(model, methods.one_shot_magnitude(0.75))
    assert int((model[0].weight == 0).sum()) == 96


def test_weights_loaded_over_the_zeros_are_told_and_cleared(tmp_path):
    model = network()
    opt = sgd(model)
    attached = pr.attach(methods.one_shot_magnitude(0.5), model, opt)
    train(model, opt.step)
    assert attached.unfinished() is None
    model.load_state_dict({"2.weight": torch.ones(4, 16)}, strict=False)
    sentence = attached.unfinished()
    assert sentence is not None
    assert sentence.startswith("2.weight hold")
    assert "enforce()" in sentence
    with pytest.warns(UserWarning, match=r"2\.weight"):
        pr.save(model, tmp_path / "model.safetensors")
    attached.enforce()
    assert attached.unfinished() is None
    assert int((model[2].weight == 0).sum()) == 32


def test_a_layer_that_is_replaced_after_attaching_is_told():
    model = network()
    opt = sgd(model)
    attached = pr.attach(methods.one_shot_magnitude(0.5), model, opt)
    model[2] = nn.Linear(16, 4)
    sentence = attached.unfinished()
    assert sentence is not None
    assert "2.weight" in sentence
    assert "0.weight" not in sentence


def test_a_checkpoint_that_does_not_fit_stays_in_the_optimizer():
    model = network()
    opt = sgd(model)
    pr.attach(methods.one_shot_magnitude(0.5), model, opt)
    saved = opt.state_dict()
    again = sgd(model := network())
    again.load_state_dict(saved)
    with pytest.raises(PrunusError, match="no site here"):
        pr.attach(methods.one_shot_magnitude(0.5), model, again, exclude="0.weight")
    assert pr.attach(methods.one_shot_magnitude(0.5), model, again).sparsity == 0.5

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from prunus.drive import Sources, collect
from prunus.errors import SignalError, ValueRangeError
from prunus.kinds import FLOW, GRADIENT
from prunus.sites import find, parameters


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def sources(model, **given):
    found = find(model)
    return Sources(model, found, parameters(model, found), given.pop("masks", {}), **given)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(count):
    return torch.randn(count, 2, 3, 3), torch.arange(count) % 3


def test_nothing_asked_nothing_given():
    assert collect(frozenset(), sources(network())).tensors == {}


def test_an_unknown_kind_is_refused_with_those_known():
    with pytest.raises(SignalError, match="no collector for curvature; known: gradient, flow"):
        collect(frozenset({"curvature"}), sources(network()))


# --- gradient ---------------------------------------------------------------------------------


def test_averaged_gradients_equal_those_of_the_full_batch():
    model = network().eval()
    x, y = data(12)
    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    got = collect(frozenset({GRADIENT}), sources(model, batches=batches, loss=loss_of))
    loss_of(model, (x, y)).backward()
    for site in find(model):
        expected = model.get_parameter(site.name).grad
        torch.testing.assert_close(got.at(site.name)[GRADIENT], expected, rtol=1e-4, atol=1e-7)


def test_gradients_of_calibration_leave_grad_alone_and_work_under_no_grad():
    model = network()
    model[5].weight.grad = torch.ones_like(model[5].weight)
    with torch.no_grad():
        got = collect(frozenset({GRADIENT}), sources(model, batches=[data(4)], loss=loss_of))
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
    assert model[0].weight.grad is None
    assert got.at("0.weight")[GRADIENT].shape == (4, 2, 3, 3)


def test_a_site_that_the_loss_does_not_reach_has_a_zero_gradient_in_calibration():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    got = collect(
        frozenset({GRADIENT}),
        sources(model, batches=[torch.ones(1, 2)], loss=lambda m, b: m["used"](b).sum()),
    )
    assert not bool(got.at("idle.weight")[GRADIENT].any())
    assert bool(got.at("used.weight")[GRADIENT].any())


def test_a_frozen_site_is_refused_by_name():
    model = network()
    model[5].weight.requires_grad_(False)
    with pytest.raises(SignalError, match=r"'5\.weight'.*is frozen.*exclude it"):
        collect(frozenset({GRADIENT}), sources(model, batches=[data(4)], loss=loss_of))


def test_in_training_the_gradient_is_the_one_that_is_there():
    model = network()
    loss_of(model, data(3)).backward()
    got = collect(frozenset({GRADIENT}), sources(model, training=True))
    assert got.at("5.weight")[GRADIENT].data_ptr() == model[5].weight.grad.data_ptr()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, SignalError, "pass batches= and loss="),
        ({"batches": [1]}, SignalError, "pass batches= and loss="),
        ({"training": True}, SignalError, r"site '0\.weight' \(shape \(4, 2, 3, 3\)\) has no grad"),
        ({"batches": [], "loss": loss_of}, ValueRangeError, "gave no batch"),
    ],
)
def test_a_gradient_that_cannot_be_had_is_refused_with_the_remedy(given, error, message):
    with pytest.raises(error, match=message):
        collect(frozenset({GRADIENT}), sources(network(), **given))


# --- synaptic flow ----------------------------------------------------------------------------


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "dtypes": [p.dtype for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "ids": [id(p) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
    }


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return all(map(equal, left, right))
    return left == right


def test_synflow_leaves_weights_grads_buffers_modes_and_random_state_untouched():
    model = network()
    model[1].eval()
    loss_of(model, data(4)).backward()
    x = torch.randn(5, 2, 3, 3)
    before, given = snapshot(model), x.clone()
    collect(frozenset({FLOW}), sources(model, inputs=x))
    assert equal(before, snapshot(model))
    assert torch.equal(x, given)


def test_synflow_depends_on_the_shape_of_the_inputs_only_and_not_on_the_mode():
    model = network()
    model(data(8)[0])  # moves the running statistics
    first = collect(frozenset({FLOW}), sources(model, inputs=torch.randn(5, 2, 3, 3)))
    model.eval()
    second = collect(frozenset({FLOW}), sources(model, inputs=torch.zeros(1, 2, 3, 3)))
    for site in find(model):
        assert first.at(site.name)[FLOW].dtype == torch.float64
        assert torch.equal(first.at(site.name)[FLOW], second.at(site.name)[FLOW])


def test_synflow_of_one_layer_and_a_norm_by_hand():
    """R = sum_o g_o / sqrt(v_o + eps) sum_i |w_oi|, biases and means do not count."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].bias.fill_(-5.0)
        model[1].weight.copy_(torch.tensor([-2.0, 3.0]))
        model[1].bias.fill_(7.0)
        model[1].running_mean.fill_(11.0)
        model[1].running_var.copy_(torch.tensor([4.0, 9.0]))
    got = collect(frozenset({FLOW}), sources(model, inputs=torch.ones(1, 3))).at("0.weight")[FLOW]
    slope = torch.tensor([2.0, 3.0]).double() / (torch.tensor([4.0, 9.0]).double() + 1e-5).sqrt()
    torch.testing.assert_close(got, slope[:, None].expand(2, 3))


def test_biases_of_attention_count_as_zero_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = Net()
    flows = []
    for value in (0.0, 3.0):
        with torch.no_grad():
            model.attention.in_proj_bias.fill_(value)
            model.attention.out_proj.bias.fill_(value)
        found = collect(frozenset({FLOW}), sources(model, inputs=torch.ones(1, 5, 4)))
        flows.append(found.at("attention.in_proj_weight")[FLOW])
    assert torch.equal(flows[0], flows[1])


def test_tied_weights_get_the_flow_through_both_places():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    w = model[0].weight.detach().double().abs().requires_grad_()
    (w @ (w @ torch.ones(3).double())).sum().backward()
    got = collect(frozenset({FLOW}), sources(model, inputs=torch.ones(1, 3))).at("0.weight")[FLOW]
    torch.testing.assert_close(got, w.grad)


@pytest.mark.parametrize("kind", ["dict", "tuple", "bare"])
def test_inputs_are_given_as_the_model_takes_them(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, tokens, scale=None):
            out = self.head(self.embed(tokens))
            return {"logits": out if scale is None else out * scale, "none": None}

    tokens, scale = torch.tensor([[1, 4], [2, 2]]), torch.full((2, 1, 1), 9.0)
    inputs = {"dict": {"tokens": tokens, "scale": scale}, "tuple": (tokens, scale), "bare": tokens}
    got = collect(frozenset({FLOW}), sources(Net(), inputs=inputs[kind]))
    assert bool((got.at("head.weight")[FLOW] > 0).all())


def test_synflow_without_inputs_is_refused_with_the_remedy():
    with pytest.raises(SignalError, match="pass inputs="):
        collect(frozenset({FLOW}), sources(network()))

"""Scores of outputs, of curvature and of training against float64 loops over their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunus import scores
from prunus.core import Context, Site
from prunus.drive import Sources, collect
from prunus.errors import SignalError
from prunus.sites import find, parameters


class Small(nn.Module):
    """A convolution with a functional ReLU, a batch norm with a module, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 5, 3, padding=1)
        self.b = nn.Conv2d(5, 4, 2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.c = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.c(self.act(self.norm(self.b(x))).flatten(1))


def network(seed=0):
    torch.manual_seed(seed)
    model = Small().double().train()
    model.norm.weight.data.uniform_(-1, 1)
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


def batches(count=3, size=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 5, 5, generator=generator).double() for _ in range(count)]


def loss(model, x):
    return model(x).square().mean()


def by_hand(model, x):
    """What the next layer gets, in eval mode: outputs of a, b, c after norm and activation."""
    a = F.relu(F.conv2d(x, model.a.weight, model.a.bias, padding=1))
    b = F.conv2d(a, model.b.weight)
    norm = model.norm
    shape = (1, -1, 1, 1)
    b = (b - norm.running_mean.reshape(shape)) / (norm.running_var + norm.eps).sqrt().reshape(shape)
    b = F.relu(b * norm.weight.reshape(shape) + norm.bias.reshape(shape))
    return {
        "a.weight": a,
        "b.weight": b,
        "c.weight": F.linear(b.flatten(1), model.c.weight, model.c.bias),
    }


def units(values):
    """[units, examples x positions] as NumPy."""
    moved = values.detach().movedim(1, 0) if values.ndim > 1 else values
    return moved.reshape(moved.shape[0], -1).numpy()


def values_of(score, model, **given):
    """One value per output and site; asserts that all weights of an output share it."""
    found = find(model, exclude=given.pop("exclude", None))
    sources = Sources(model, found, parameters(model, found), {}, **given)
    signals = collect(score.needs, sources)
    values = {}
    for site in found:
        w = model.get_parameter(site.name).detach()
        value = score.value(w, Context(site, signals.at(site.name)))
        flat = value.flatten(1)
        assert torch.equal(flat, flat[:, :1].expand_as(flat))
        values[site.name] = flat[:, 0].double().numpy()
    return values


def everything(model):
    return {name: units(torch.cat(parts)) for name, parts in gathered(model).items()}


def gathered(model):
    found = [by_hand(model, x) for x in batches()]
    return {name: [one[name] for one in found] for name in found[0]}


MEASURES = {
    "apoz": lambda a: -(a == 0).mean(1),
    "mean_activation": lambda a: np.abs(a).mean(1),
    "constant_output": lambda a: a.var(1),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("with_loss", [True, False])
def test_statistics_of_activations(name, with_loss):
    model = network()
    data = {"batches": batches(), **({"loss": loss} if with_loss else {})}
    found = values_of(getattr(scores, name)(), model, **data)
    for site, activations in everything(model).items():
        np.testing.assert_allclose(found[site], MEASURES[name](activations), rtol=1e-10, atol=1e-14)
    assert model.training
    assert model.norm.training


def test_correlation_removes_one_of_the_nearest_pair_after_the_other():
    model = network(2)
    model.b.weight.data[2] = model.b.weight.data[0]
    model.norm.weight.data[2] = model.norm.weight.data[0] * 3
    for name in ("running_mean", "running_var", "bias"):
        getattr(model.norm, name).data[2] = getattr(model.norm, name).data[0]
    found = values_of(scores.correlation(), model, batches=batches())
    for site, activations in everything(model).items():
        left, expected = list(range(len(activations))), np.ones(len(activations))
        alike = np.abs(np.nan_to_num(np.corrcoef(activations), nan=1.0))
        while len(left) > 1:
            i, j = max(itertools.combinations(left, 2), key=lambda p: alike[p])
            gone = i if activations[i].var() < activations[j].var() else j
            expected[gone] = 1 - alike[i, j]
            left.remove(gone)
        np.testing.assert_allclose(found[site], expected, atol=1e-9)
    assert found["b.weight"][0] == pytest.approx(0.0, abs=1e-9)  # its louder twin stays
    assert found["b.weight"][2] > 1e-3


def test_gates_and_filter_taylor_from_gates_in_the_network():
    model = network(3).eval()
    relevance = values_of(scores.skeletonization(), model, batches=batches(), loss=loss)
    taylor = values_of(scores.taylor_filter(), model, batches=batches(), loss=loss)
    for site in ("a.weight", "b.weight"):
        gates, theta, count = 0.0, 0.0, 0
        for x in batches():
            outputs = by_hand_from(model, x, site)
            value = outputs.detach().requires_grad_()
            total = finish(model, value, site).square().mean()
            (grad,) = torch.autograd.grad(total, value)
            product = (grad * value.detach()).numpy()
            gates = gates + product.sum((0, 2, 3))
            for example in product:
                theta = theta + np.abs(example.mean((1, 2)))
                count += 1
        np.testing.assert_allclose(relevance[site], -gates / 3, rtol=1e-9)
        theta = theta / count
        np.testing.assert_allclose(taylor[site], theta / np.sqrt((theta**2).sum()), rtol=1e-9)


def by_hand_from(model, x, site):
    return by_hand(model, x)[site]


def finish(model, value, site):
    """The network from an activation on."""
    if site == "a.weight":
        b = model.norm(F.conv2d(value, model.b.weight))
        value = F.relu(b)
    return F.linear(value.flatten(1), model.c.weight, model.c.bias)


def test_sensitivity_is_the_largest_rms_derivative():
    model = network(4).eval()
    found = values_of(scores.sensitivity(), model, batches=batches())
    for site in ("a.weight", "b.weight"):
        total, count = 0.0, 0
        for x in batches():
            value = by_hand(model, x)[site].detach()
            for one in value:
                jacobian = torch.autograd.functional.jacobian(
                    lambda v, site=site: finish(model, v.unsqueeze(0), site)[0], one
                )
                total = total + jacobian.square().sum((2, 3)).numpy()
                count += 1
        np.testing.assert_allclose(found[site], np.sqrt(total / count).max(0), rtol=1e-9)


def test_nisp_is_a_product_of_absolute_matrices():
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    model[3] = nn.ReLU()
    found = values_of(scores.nisp(), model, inputs=torch.randn(7, 4).double())
    w2, w3 = (np.abs(model[i].weight.detach().numpy()) for i in (2, 4))
    np.testing.assert_allclose(found["4.weight"], np.ones(3))
    np.testing.assert_allclose(found["2.weight"], w3.T @ np.ones(3), rtol=1e-12)
    np.testing.assert_allclose(found["0.weight"], w2.T @ w3.T @ np.ones(3), rtol=1e-12)


def test_batchnorm_scale_belongs_to_the_layer_before_it():
    model = network(6)
    found = values_of(scores.batchnorm_scale(), model, inputs=batches()[0], exclude=["a", "c"])
    np.testing.assert_allclose(found["b.weight"], model.norm.weight.detach().abs())
    with pytest.raises(SignalError, match=r"follows a\.weight, c\.weight"):
        values_of(scores.batchnorm_scale(), model, inputs=batches()[0])


def test_without_data_the_error_says_what_to_pass():
    with pytest.raises(SignalError, match="pass batches=, calibration data, or inputs="):
        values_of(scores.apoz(), network())
    with pytest.raises(SignalError, match="pass batches= and loss="):
        values_of(scores.taylor_filter(), network(), batches=batches())


# --- data-free --------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_geometric_median_and_similarity_by_loops(transposed):
    w = np.random.default_rng(8).normal(size=(6, 4, 3))
    w[4] = w[1] * 1.01
    tensor = torch.from_numpy(w)
    at = Context(Site("w", w.shape))
    if transposed:
        tensor = tensor.transpose(0, 1).contiguous()
        at = Context(Site("w", tuple(tensor.shape), transposed=True))
    distance = np.array([[np.sqrt(((x - y) ** 2).sum()) for y in w] for x in w])
    median = scores.geometric_median().value(tensor, at)
    unlike = scores.similarity().value(tensor, at)
    if transposed:
        median, unlike = median.transpose(0, 1), unlike.transpose(0, 1)
    np.testing.assert_allclose(median[:, 0, 0], distance.sum(1), rtol=1e-10)
    left, norms, order = list(range(6)), (w**2).sum((1, 2)), []
    while len(left) > 1:
        i, j = min(itertools.combinations(left, 2), key=lambda p: distance[p])
        gone = i if norms[i] < norms[j] else j
        assert unlike[gone, 0, 0].item() == pytest.approx(distance[i, j] ** 2, rel=1e-9)
        order.append(gone)
        left.remove(gone)
    assert order[0] == 1
    assert int(unlike[:, 0, 0].argmax()) == left[0]


# --- first order ------------------------------------------------------------------------------


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def first_order(score, model, data, memory=None):
    found = find(model)
    sources = Sources(model, found, parameters(model, found), {}, batches=data, loss=loss)
    signals = collect(score.needs, sources)
    return {
        s.name: score.value(
            model.get_parameter(s.name).detach(),
            Context(s, signals.at(s.name), memory={} if memory is None else memory[s.name]),
        )
        for s in found
    }


def test_grasp_by_the_whole_hessian_and_by_finite_differences():
    model = mlp(9)
    data = [torch.randn(5, 3).double() for _ in range(3)]
    names = [s.name for s in find(model)]
    sizes = [model.get_parameter(n).numel() for n in names]
    start = torch.cat([model.get_parameter(n).detach().reshape(-1) for n in names])

    def total(flat):
        state = {n: p.detach() for n, p in model.named_parameters()}
        for name, part in zip(names, flat.split(sizes), strict=True):
            state[name] = part.reshape(state[name].shape)
        outs = [torch.func.functional_call(model, state, x).square().mean() for x in data]
        return torch.stack(outs).mean()

    hessian = torch.autograd.functional.hessian(total, start)
    gradient = torch.autograd.functional.jacobian(total, start)
    expected = start * (hessian @ gradient)
    found = torch.cat([v.reshape(-1) for v in first_order(scores.grasp(), model, data).values()])
    np.testing.assert_allclose(found, expected, rtol=1e-9)

    def norm(flat):
        return float(torch.autograd.functional.jacobian(total, flat).square().sum())

    h = 1e-5
    for place in range(len(start)):
        step = torch.zeros_like(start)
        step[place] = h * start[place]
        slope = (norm(start - step) - norm(start + step)) / (2 * h)  # of removing it
        assert -2 * float(found[place]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_taylor_of_a_group_is_the_square_of_its_sum():
    model, data = mlp(10), [torch.randn(6, 3).double()]
    grads = torch.autograd.grad(loss(model, data[0]), [model[0].weight, model[2].weight])
    for axis in (0, 1):
        found = first_order(scores.taylor_group(axis), model, data)
        for name, grad in zip(found, grads, strict=True):
            product = (grad * model.get_parameter(name)).detach().numpy()
            expected = product.sum(1 - axis) ** 2
            np.testing.assert_allclose(found[name].sum(1 - axis), expected, rtol=1e-10)


def test_force_counts_the_value_that_a_weight_would_return_with():
    model, data = mlp(11), [torch.randn(6, 3).double()]
    hidden = {s.name: {"reserve": torch.full(s.shape, 2.0).double()} for s in find(model)}
    found = first_order(scores.force(), model, data, hidden)
    grads = torch.autograd.grad(loss(model, data[0]), [model[0].weight, model[2].weight])
    for name, grad in zip(found, grads, strict=True):
        expected = (grad * (model.get_parameter(name) + 2)).abs().detach()
        np.testing.assert_allclose(found[name], expected, rtol=1e-10)


# --- while training ---------------------------------------------------------------------------


def test_movement_and_total_change_over_a_few_steps_of_descent():
    rng = np.random.default_rng(12)
    w, rate = rng.normal(size=(3, 4)), 0.1
    moved, change, first = np.zeros_like(w), np.zeros_like(w), w.copy()
    movement, change_score = scores.movement(), scores.total_change(rate)
    memories = [{}, {}]
    for _ in range(5):
        gradient = rng.normal(size=w.shape)
        at = [
            Context(Site("w", w.shape), {"gradient": torch.from_numpy(gradient)}, memory=m)
            for m in memories
        ]
        memories = [
            s.observe(torch.from_numpy(w.copy()), c)
            for s, c in zip((movement, change_score), at, strict=True)
        ]
        moved -= gradient * w
        change += (rate * gradient) ** 2
        w = w - rate * gradient
    at = Context(Site("w", w.shape), memory=memories[0])
    np.testing.assert_allclose(movement.value(torch.from_numpy(w), at), moved, rtol=1e-12)
    memory = change_score.observe(
        torch.from_numpy(w), Context(Site("w", w.shape), memory=memories[1])
    )
    found = change_score.value(torch.from_numpy(w), Context(Site("w", w.shape), memory=memory))
    np.testing.assert_allclose(found, change * w / (rate * (w - first)), rtol=1e-9)

"""Growth methods of packed layers: counts, resume, and agreement with the masked simulation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunus as pr
from prunus import allocations, attach, growth, methods
from prunus.core import Context, Site
from prunus.errors import AttachError, CompositionError, ValueRangeError
from prunus.training import (
    SparseWeight,
    TrainableConv2d,
    TrainableLinear,
    dynamic,
    recipes,
    sparse_training,
    to_dense,
)
from prunus.training.candidates import attached_places
from prunus.training.walks import signs, walk

STEPS = 40


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 20), nn.ReLU(),
        nn.Linear(20, 4),
    ).double()  # fmt: skip


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 2, 5, 5, generator=generator).double()
    return x, torch.randint(0, 4, (16,), generator=generator)


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)  # kept alive: the old graph sees layers change size
        loss.backward()
        optimizer.step()


RECIPES = {
    "set_": lambda: recipes.set_(STEPS, every=4),
    "rigl": lambda: recipes.rigl(STEPS, every=4),
    "hebbian": lambda: recipes.rigl(STEPS, every=4, grow="hebbian"),
    "preferential": lambda: recipes.rigl(STEPS, every=4, grow="preferential"),
    "itop": lambda: recipes.itop(STEPS),
    "mest": lambda: recipes.mest(STEPS, every=4),
    "granet": lambda: recipes.granet(0.9, STEPS, every=4, initial=0.7),
    "nest": lambda: recipes.nest(0.9, STEPS, every=4, seed_sparsity=0.7, peak_sparsity=0.5),
    "deep_rewiring": lambda: recipes.deep_rewiring(STEPS, lr=0.02, l1=0.1),
    "dynamic_reparameterization": lambda: recipes.dynamic_reparameterization(STEPS, every=4),
    "top_kast": lambda: recipes.top_kast(0.85, STEPS, every=2, pause=6),
}
CHANGING = ("granet", "nest")


def layers(model):
    return [m for m in model.modules() if isinstance(m, SparseWeight)]


def begin(name, seed=0):
    model = sparse_training(net(seed), 0.7, allocation=allocations.uniform(), seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    return model, optimizer, dynamic(model, optimizer, RECIPES[name](), seed=3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_moves_keeps_counts_and_resumes_bit_for_bit(name):
    model, optimizer, driver = begin(name)
    start = [layer.pattern.places() for layer in layers(model)]
    train(model, optimizer, 0, 32)
    ends = [layer.pattern.places() for layer in layers(model)]
    assert any(a.tolist() != b.tolist() for a, b in zip(start, ends, strict=True))
    if name not in CHANGING:
        assert sum(map(len, start)) == sum(map(len, ends))
    if name not in (*CHANGING, "deep_rewiring", "dynamic_reparameterization"):
        assert [len(a) for a in start] == [len(a) for a in ends]
    for interrupt in (15, 16):
        first, optimizer, driver = begin(name)
        train(first, optimizer, 0, interrupt)
        saved = copy.deepcopy([first.state_dict(), optimizer.state_dict(), driver.state_dict()])
        second = sparse_training(net(5), 0.6, allocation=allocations.uniform())
        second.load_state_dict(saved[0])
        optimizer = torch.optim.AdamW(second.parameters(), lr=0.02)
        optimizer.load_state_dict(saved[1])
        driver = dynamic(second, optimizer, RECIPES[name]())
        driver.load_state_dict(saved[2])
        train(second, optimizer, interrupt, 32)
        for left, right in zip(layers(model), layers(second), strict=True):
            assert torch.equal(left.dense_weight(), right.dense_weight())
            assert torch.equal(left.values, right.values)


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        (
            methods.granet(0.9, STEPS, every=4, initial=0.5, stop=0.75),
            recipes.granet(0.9, STEPS, every=4, initial=0.5, stop=0.75),
        ),
        (
            methods.nest(0.9, STEPS, every=4, seed_sparsity=0.8, peak_sparsity=0.5),
            recipes.nest(0.9, STEPS, every=4, seed_sparsity=0.8, peak_sparsity=0.5),
        ),
    ],
    ids=["granet", "nest"],
)
def test_what_grows_by_gradient_is_the_masked_simulation(method, recipe):
    masked = net()
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.05, momentum=0.9)
    attached = attach(method, masked, optimizer, seed=1)
    train(masked, optimizer, 0, 1)  # the first mask may need the first gradient
    model = net()
    model.load_state_dict(masked.state_dict())
    packed = sparse_training(model, masks=dict(attached.masks))
    other = torch.optim.SGD(packed.parameters(), lr=0.05, momentum=0.9)
    for (name, parameter), twin in zip(masked.named_parameters(), packed.parameters(), strict=True):
        moment = optimizer.state[parameter]["momentum_buffer"]
        kept = attached.masks.get(name)
        other.state[twin]["momentum_buffer"] = (moment if kept is None else moment[kept]).clone()
    driver = dynamic(packed, other, recipe)
    driver.load_state_dict({"step": 1, "seed": 0})
    train(masked, optimizer, 1, STEPS)
    train(packed, other, 1, STEPS)
    for name, mask in attached.masks.items():
        layer = packed.get_submodule(name.rpartition(".")[0])
        assert torch.equal(layer.mask(), mask), name
    reached = 1 - sum(la.nonzeros for la in layers(packed)) / sum(
        math.prod(la.shape) for la in layers(packed)
    )
    assert reached == pytest.approx(0.9, abs=0.002)


def test_mest_drops_by_weight_and_gradient():
    values, grad = torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([0.0, 0.0, 90.0, 1.0])
    layer = recipes.Stored(values, grad, torch.arange(4), 20)
    moves, _ = recipes.mest(100, every=1, fraction=0.5, gradient=0.1, stop=1.0).plan(
        {"a": layer}, recipes.At(1, 0, {})
    )
    assert moves["a"].drop.tolist() == [False, True, False, False]  # 3.0, 1.0, 9.5, 2.1
    assert moves["a"].grow == 1


@pytest.mark.parametrize("shape", [(9, 12), (5, 4, 3, 3)])
def test_preferential_places_are_those_of_the_masked_growth(shape):
    torch.manual_seed(0)
    mask = torch.rand(shape) > 0.7
    weight = torch.randn(shape) * mask
    dense = nn.Linear(12, 9) if len(shape) == 2 else nn.Conv2d(4, 5, 3)
    dense.weight.data.copy_(weight)
    kind = TrainableLinear if len(shape) == 2 else TrainableConv2d
    layer = kind.from_dense(dense, mask)
    at = Context(Site("w", shape), mask=mask, key=(7, 3, "w"))
    ranking = growth.preferential(growth.fixed(0.1)).value(weight, at).masked_fill(mask, -math.inf)
    expected = ranking.flatten().sort(descending=True).indices[:11].sort().values
    found = attached_places(layer.pattern, 11, (7, 3, "w", "grow"), math.prod(shape[2:]))
    assert found.tolist() == expected.tolist()


def test_hebbian_growth_takes_the_largest_coactivations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(75, 4)).double()
    sparse_training(model, 0.6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dynamic(model, optimizer, recipes.rigl(10, every=1, grow="hebbian", fraction=0.9, stop=1.0))
    x = torch.randn(6, 2, 5, 5).double()
    model(x).sum().backward()
    optimizer.step()  # step 0 moves nothing
    before = [layer.mask() for layer in layers(model)]
    with torch.no_grad():  # no pass of the training
        y0 = model[0](x)
        unfolded = F.unfold(x, 3, padding=1)
        conv = torch.einsum("bmp,bkp->mk", y0.flatten(2), unfolded).reshape(before[0].shape)
        linear = model(x).t() @ y0.flatten(1)
    model(x).sum().backward()
    optimizer.step()
    for layer, activity, old in zip(layers(model), (conv, linear), before, strict=True):
        grown = layer.mask() & ~old
        assert grown.any()
        rest = activity.abs()[~old & ~grown]
        assert float(activity.abs()[grown].min()) >= float(rest.max())


def test_deep_rewiring_never_changes_a_sign_and_wakes_as_many_as_fall_asleep():
    places = torch.arange(0, 4000, 4)
    sign = signs(places, 1, "a").double()
    assert abs(float(sign.mean())) < 0.1
    assert torch.equal(sign[10:20], signs(places[10:20], 1, "a").double())
    held = sign * torch.rand(1000).double()
    values, drop, grow = walk({"a": (held, places, 3000)}, {"a": None}, 0.1, 0.3, 0.0, 5, 1)["a"]
    assert torch.equal(drop, held.abs() < 0.3)
    assert grow == int(drop.sum())
    torch.testing.assert_close(values[~drop], (held - 0.3 * sign)[~drop])
    none = {"a": None, "b": None}
    both = walk({"a": (held, places, 1), "b": (held, places, 10**9)}, none, 0.1, 0.3, 0.0, 5, 1)
    assert both["a"][2] <= 1
    assert both["a"][2] + both["b"][2] == int(both["a"][1].sum() + both["b"][1].sum())


def test_top_kast_computes_with_the_forward_set_and_learns_the_backward_set():
    model, optimizer, _ = begin("top_kast")
    train(model, optimizer, 0, 9)
    for layer in layers(model):
        keep = round(0.15 * math.prod(layer.shape))
        assert int(layer.forward_set.sum()) == keep == int(layer.mask().sum())
        assert layer.nonzeros == pytest.approx(2 * keep, rel=0.05)
        assert bool((layer.values.grad[~layer.forward_set] != 0).any())
    x, _ = batch(0)
    expected = model(x)
    state = model.state_dict()
    again = sparse_training(net(4), 0.5, allocation=allocations.uniform())
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), expected)
    state["3.forward_set"] = state["3.forward_set"][:-1]
    with pytest.raises(RuntimeError, match="forward set"):
        again.load_state_dict(state)
    kept = [layer.mask() for layer in layers(model)]
    dense = to_dense(model)
    torch.testing.assert_close(dense(x), expected)
    assert torch.equal(dense[3].weight != 0, kept[1])


def test_mistakes_are_told():
    model, optimizer, _ = begin("rigl")
    with pytest.raises(CompositionError, match=r"recipe.*average gradient is dense"):
        dynamic(model, optimizer, methods.sparse_momentum(0.9, 100))
    with pytest.raises(ValueRangeError, match="one of random"):
        recipes.rigl(10, grow="nothing")
    with pytest.raises(ValueRangeError, match="at least 1"):
        recipes.set_(10, every=0)
    model, optimizer, driver = begin("rigl")
    with pytest.raises(AttachError, match="detach"):
        dynamic(model, optimizer, recipes.top_kast(0.3, 10))
    driver.detach()
    dynamic(model, optimizer, recipes.top_kast(0.3, 10))
    with pytest.raises(ValueRangeError, match="lower sparsity"):
        train(model, optimizer, 0, 1)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("set_", {"steps": -3}),
        ("set_", {"steps": 10.5}),
        ("set_", {"steps": "a"}),
        ("set_", {"fraction": 2}),
        ("rigl", {"stop": -1}),
        ("rigl", {"stop": math.nan}),
        ("itop", {"every": 0}),
        ("mest", {"gradient": -1}),
        ("granet", {"sparsity": 0.3}),
        ("nest", {"sparsity": 0.5}),
        ("nest", {"grown": 3}),
        ("deep_rewiring", {"lr": -1}),
        ("deep_rewiring", {"temperature": math.inf}),
        ("dynamic_reparameterization", {"threshold": 0}),
        ("dynamic_reparameterization", {"tolerance": -1}),
        ("top_kast", {"every": 0}),
        ("top_kast", {"explore": 3}),
        ("top_kast", {"decay": -1}),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(name, given):
    first = {"steps": 10}
    if name in ("granet", "nest", "top_kast"):
        first["sparsity"] = 0.9
    if name == "deep_rewiring":
        first["lr"] = 0.1
    with pytest.raises(ValueRangeError, match=next(iter(given))):
        getattr(recipes, name)(**{**first, **given})


def test_a_saved_model_fills_one_with_other_counts_and_optional_sets(tmp_path):
    model, optimizer, _ = begin("top_kast")
    train(model, optimizer, 0, 9)
    pr.save(model, tmp_path / "packed.safetensors")
    other = sparse_training(net(2), 0.5, allocation=allocations.uniform())
    pr.load(tmp_path / "packed.safetensors", other)
    x, _ = batch(0)
    torch.testing.assert_close(other(x), model(x))
    for left, right in zip(layers(model), layers(other), strict=True):
        assert torch.equal(left.forward_set, right.forward_set)
    pr.save(begin("set_")[0], tmp_path / "plain.safetensors")
    pr.load(tmp_path / "plain.safetensors", other)
    assert all(layer.forward_set is None for layer in layers(other))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at what it resumes with
def test_compiled_surroundings_train_and_move():
    model, optimizer, driver = begin("rigl")
    compiled = torch.compile(model, backend="eager")
    twin, other, _ = begin("rigl")
    train(compiled, optimizer, 0, 14)
    train(twin, other, 0, 14)
    assert driver.step == 14
    for left, right in zip(layers(model), layers(twin), strict=True):
        assert torch.equal(left.mask(), right.mask())
        torch.testing.assert_close(left.values, right.values)

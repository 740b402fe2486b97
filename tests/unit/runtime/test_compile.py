"""compile: what is swapped, what is refused and why, and that the result computes the same."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus.errors import ValueRangeError
from prunus.runtime import SparseConv2d, SparseLinear, VerificationError, compile
from prunus.runtime.measure import thread_count
from prunus.runtime.plan import Layer


def prune_(model, sparsity=0.9, seed=0):
    """Zero a fraction of every matrix, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) >= sparsity)
    return model


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(*sizes, sparsity=0.9):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return prune_(nn.Sequential(*layers[:-1]), sparsity)


def forced(layer):
    return "csr"


def reasons(model):
    return {row.name: row.reason for row in model.plan.rows}


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 65), min_size=2, max_size=4),
    batch=st.integers(1, 9),
    sparsity=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
)
def test_a_compiled_perceptron_computes_the_dense_one(sizes, batch, sparsity):
    model, x = mlp(*sizes, sparsity=sparsity), draw(batch, sizes[0])
    fast = compile(model, x, choose=forced)
    assert len(fast.plan.sparse_layers) == len(sizes) - 1
    wanted = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(fast(x).double(), wanted, rtol=1e-4, atol=1e-4)


def cnn():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 3, groups=4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 5),
    ]
    return prune_(nn.Sequential(*layers), 0.8)


def test_a_compiled_cnn_computes_the_dense_one():
    model, x = cnn(), draw(2, 3, 9, 7)
    fast = compile(model, x, choose=forced)
    assert [type(layer) for layer in fast if isinstance(layer, (SparseConv2d, SparseLinear))] == [
        SparseConv2d,
        SparseConv2d,
        SparseConv2d,
        SparseLinear,
    ]
    torch.testing.assert_close(fast(x), copy.deepcopy(model).eval()(x), rtol=1e-4, atol=1e-5)


def test_the_original_is_untouched_and_the_copy_is_for_inference():
    model, x = cnn().train(), draw(2, 3, 9, 7)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fast = compile(model, x, choose=forced)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not any(
        one.data_ptr() == other.data_ptr()
        for one in model.parameters()
        for other in fast.parameters()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_clock_decides_without_choose_and_the_plan_has_its_times():
    model, x = mlp(96, 80, 10, sparsity=0.95), draw(4, 96)
    fast = compile(model, x)
    plan = fast.plan
    assert [row.name for row in plan.rows] == ["0", "2"]
    measured = [row for row in plan.rows if row.dense_seconds is not None]
    for row in measured:
        assert row.sparse_seconds > 0
        assert "x dense" in row.reason
    for row in plan.rows:
        packed = isinstance(fast.get_submodule(row.name), SparseLinear)
        assert packed == (row.choice == "csr")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_without_sparse_layers_stays_dense_and_says_why():
    model, x = mlp(30, 20, 10, sparsity=0.1), draw(3, 30)
    fast = compile(model, x)
    assert set(reasons(fast).values()) == {"less than 25% sparse"}
    assert "stays dense" in fast.plan.reason
    assert fast.plan.sparse_layers == ()
    assert torch.equal(fast(x), model(x))
    assert compile(nn.ReLU(), x).plan.rows == ()


def test_choose_sees_the_layer_and_a_plan_can_be_used_again():
    seen = []
    model, x = mlp(30, 20, 10), draw(3, 30)

    def choose(layer):
        seen.append(layer)
        return "csr" if layer.name == "2" else "dense"

    fast = compile(model, x, choose=choose)
    kept = int(model[0].weight.count_nonzero())
    assert seen[0] == Layer("0", "linear", (20, 30), 1 - kept / 600, kept)
    assert fast.plan.sparse_layers == ("2",)
    assert compile(model, x, choose=fast.plan.choose).plan.sparse_layers == ("2",)
    with pytest.raises(ValueRangeError, match=r"'sparse' for layer '0'.* or 'dense'"):
        compile(model, x, choose=lambda layer: "sparse")


class Shared(nn.Module):
    """One layer under two names, in a plain list as well, and called by keyword."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.steps = [self.first]

    def forward(self, x, scale):
        x = self.second(self.first(input=x))
        return {"out": self.steps[0](x) * scale, "nested": [(x, None)]}


def test_a_shared_layer_is_swapped_wherever_the_model_refers_to_it():
    model, inputs = prune_(Shared(), 0.5), {"x": draw(3, 6), "scale": 2.0}
    fast = compile(model, inputs, choose=forced)
    assert isinstance(fast.first, SparseLinear)
    assert fast.second is fast.first
    assert fast.steps[0] is fast.first
    wanted = model(**inputs)
    torch.testing.assert_close(fast(**inputs), wanted, rtol=1e-4, atol=1e-5)
    assert compile(model, (inputs["x"], 2.0), choose=forced).plan.sparse_layers == ("first",)


def test_a_single_layer_is_a_model():
    model, x = prune_(nn.Linear(20, 10)), draw(3, 20)
    fast = compile(model, x, choose=forced)
    assert isinstance(fast, SparseLinear)
    assert fast.plan.sparse_layers == ("",)
    assert "(model)" in str(fast.plan)


def test_wrappers_are_looked_through():
    model, x = mlp(30, 20, 10), draw(3, 30)
    fast = compile(torch.compile(model, backend="eager"), x, choose=forced)
    assert type(fast) is nn.Sequential
    assert len(fast.plan.sparse_layers) == 2


def test_state_that_a_forward_pass_changes_is_that_of_the_original():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.seen += 1
            return self.fc(x)

    model = Counter()
    fast = compile(model, draw(2, 6), choose=forced)
    assert model.seen == 0
    assert fast.seen == 0


def test_randomness_in_the_model_does_not_disturb_verification():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(nn.functional.dropout(x, 0.5, training=True))

    assert compile(Noisy(), draw(8, 6), choose=forced).plan.sparse_layers == ("fc",)


def test_a_model_with_a_plan_of_its_own_keeps_it():
    class Planned(nn.Module):
        def __init__(self):
            super().__init__()
            self.plan = nn.Linear(6, 5)

        def forward(self, x):
            return self.plan(x)

    fast = compile(Planned(), draw(2, 6), choose=forced)
    assert isinstance(fast.plan, SparseLinear)
    assert fast.prunus_plan.sparse_layers == ("plan",)


def test_code_that_reads_the_weight_of_a_layer_still_works():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = prune_(nn.Linear(6, 5))

        def forward(self, x):
            return self.fc(x.to(self.fc.weight.dtype)) + self.fc.weight.sum()

    model, x = Reader(), draw(2, 6)
    torch.testing.assert_close(compile(model, x, choose=forced)(x), model(x))


def wrong_twin(monkeypatch, name):
    """Make the packed twin of one layer compute something else."""
    from prunus.runtime import candidates

    right = candidates.pack_layer

    def pack(module):
        twin = right(module)
        if module.out_features == name:
            twin.bias.add_(1.0)
        return twin

    monkeypatch.setattr(candidates, "pack_layer", pack)


def test_a_wrong_layer_is_found_and_named(monkeypatch):
    wrong_twin(monkeypatch, 20)
    model, x = mlp(30, 25, 20, 10), draw(3, 30)
    with pytest.raises(VerificationError, match=r"at output .*first layer that differs is '2'"):
        compile(model, x, choose=forced)
    assert compile(model, x, choose=forced, verify=False).plan.sparse_layers == ("0", "2", "4")


def test_nan_and_integer_outputs_are_compared_exactly(monkeypatch):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 20)

        def forward(self, x):
            y = self.fc(x)
            return (
                y.argmax(-1),
                y.masked_fill(y > 0, float("nan")),
                y.masked_fill(y > 0, -torch.inf),
            )

    torch.manual_seed(0)
    model, x = Ends(), draw(4, 6)
    assert compile(model, x, choose=forced).plan.sparse_layers == ("fc",)
    wrong_twin(monkeypatch, 20)
    with pytest.raises(VerificationError, match=r"output\[1\]"):
        compile(model, x, choose=forced)


def test_threads_are_set_while_measuring_and_restored():
    before, seen = torch.get_num_threads(), []

    def choose(layer):
        seen.append(torch.get_num_threads())
        return "dense"

    fast = compile(mlp(6, 5), draw(2, 6), threads=before + 1, choose=choose)
    assert seen == [before + 1]
    assert fast.plan.threads == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), thread_count(before + 1):
        1 / 0
    assert torch.get_num_threads() == before


def test_a_compiled_model_copies_stores_and_compiles_further():
    model, x = mlp(30, 20, 10), draw(3, 30)
    fast = compile(model, x, choose=forced)
    twin = copy.deepcopy(fast)
    assert twin.plan == fast.plan
    assert torch.equal(twin(x), fast(x))
    other = compile(mlp(30, 20, 10, sparsity=0.5), x, choose=forced)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), fast(x))
    graph = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(x), fast(x))
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), fast(x))
    again = compile(fast, x, choose=forced)
    assert again.plan.rows == ()
    assert torch.equal(again(x), fast(x))


def test_one_and_two_threads_give_equal_results():
    fast = compile(cnn(), draw(2, 3, 9, 7), choose=lambda layer: "csr")
    x, results = draw(16, 3, 32, 32), []
    for threads in (1, 2):
        with thread_count(threads):
            results.append(fast[0](x))
    assert torch.equal(*results)

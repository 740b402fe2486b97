"""Block by block: what each block is pruned on is what the pruned blocks before it put out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import methods, schedules, scores, solvers
from prunus.compose import compose
from prunus.core import Context, Score
from prunus.drive import prune, prune_sequential
from prunus.errors import NotFiniteError, SignalError, SiteError, ValueRangeError
from prunus.kinds import GRAM
from prunus.sites import find
from prunus.structures import element


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.left, self.right = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.calls = 0

    def forward(self, x, scale, *, use_cache=True, note=None):
        self.calls += 1
        assert use_cache is False
        return x + self.right(torch.relu(self.left(x))) * scale, note


class Stack(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(6, 2)

    def forward(self, x, scale=1.0):
        x = self.first(x)
        for block in self.blocks:
            x, _ = block(x, scale, use_cache=False, note="n")
        return self.head(x)


def stack():
    torch.manual_seed(0)
    return Stack().double()


def data():
    return [torch.randn(20, 4).double() for _ in range(3)]


def by_hand(model, batches, sparsity):
    """Prune each block on the outputs of the pruned ones, with the solver itself."""
    solver = solvers.sparsegpt()
    with torch.no_grad():
        now = [model.first(x) for x in batches]
        for number, block in enumerate(model.blocks):
            x = torch.cat(now)
            seen = {"left": x, "right": torch.relu(block.left(x))}
            for name, inputs in seen.items():
                layer = getattr(block, name)
                site = next(s for s in find(model) if s.name == f"blocks.{number}.{name}.weight")
                w = layer.weight.detach().clone()
                gram = (inputs.T @ inputs / len(inputs))[None]
                k = w.numel() - int(sparsity * w.numel())
                scored = element().reduce(w.abs())
                _, new = solver.solve(w, scored, k, element(), Context(site, {GRAM: gram}))
                seen[name] = new
            for name, new in seen.items():
                getattr(block, name).weight.copy_(new)
            now = [block(x, 1.0, use_cache=False)[0] for x in now]


def test_it_equals_pruning_block_after_block_by_hand():
    torch.manual_seed(1)
    batches = data()
    model, expected = stack(), stack()
    masks = prune(model, methods.sparsegpt(0.5), batches=batches, sequential=True)
    by_hand(expected, batches, 0.5)
    assert sorted(masks) == [
        f"blocks.{number}.{name}.weight" for number in range(3) for name in ("left", "right")
    ]
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        if name in masks:
            assert torch.equal(got != 0, masks[name])
            assert int(masks[name].sum()) == masks[name].numel() // 2


def test_seeing_pruned_inputs_differs_from_seeing_dense_ones():
    batches = data()
    together, after = stack(), stack()
    prune(together, methods.sparsegpt(0.5), batches=batches, include="blocks.*")
    prune(after, methods.sparsegpt(0.5), batches=batches, sequential=True)
    first = torch.equal(together.blocks[0].left.weight, after.blocks[0].left.weight)
    assert first
    assert not torch.equal(together.blocks[2].left.weight, after.blocks[2].left.weight)


def test_only_the_first_batch_runs_through_the_stack_if_blocks_are_called_alike():
    model = stack()
    prune_sequential(model, methods.wanda(0.5), data())
    # recorded once (the last is stopped before it runs), measured, and run for the next
    assert [block.calls for block in model.blocks] == [1 + 3 + 3, 1 + 3 + 3, 3]
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Graded(Stack):
    def forward(self, x, scale=1.0):
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x, _ = block(x, torch.full((len(x), 1), scale * number), use_cache=False)
        return self.head(x)


def test_blocks_that_are_called_differently_keep_their_own_arguments():
    torch.manual_seed(0)
    model, batches = Graded().double(), data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = prune_sequential(model, methods.wanda(0.5), batches)
    assert [block.calls for block in model.blocks] == [9, 9, 3]
    with torch.no_grad():
        x = model.first(torch.cat(batches))
        for number, block in enumerate(model.blocks):
            w = before[f"blocks.{number}.left.weight"]
            ranked = w.abs() * x.norm(dim=0)
            off = torch.zeros_like(w, dtype=torch.bool)
            off.scatter_(1, ranked.argsort(1)[:, :3], True)
            assert torch.equal(masks[f"blocks.{number}.left.weight"], ~off)
            x = block(x, float(number), use_cache=False)[0]


def test_progress_and_data_from_a_generator_and_a_loss():
    seen = []
    prune_sequential(
        stack(),
        methods.wanda(0.5),
        ({"x": x, "y": 0} for x in data()),
        loss=lambda m, batch: m(batch["x"]).sum(),
        progress=lambda *args: seen.append(args),
    )
    assert seen == [(0, 3, "blocks.0"), (1, 3, "blocks.1"), (2, 3, "blocks.2"), (3, 3, "")]


def test_nothing_else_of_the_model_is_touched():
    model = stack().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = data()
    state = torch.get_rng_state()
    masks = prune_sequential(model, methods.wanda(0.5), batches, exclude="blocks.1")
    assert sorted(masks) == [
        f"blocks.{number}.{name}.weight" for number in (0, 2) for name in ("left", "right")
    ]
    for name, value in model.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, expected)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_sequence_with_layers_that_write_in_place():
    torch.manual_seed(0)

    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 6)),
            nn.ELU(inplace=True),
            nn.Sequential(nn.ELU(inplace=True), nn.Linear(6, 3)),
        )

    x = torch.randn(30, 4)
    kept = x.clone()
    model = make()
    masks = prune_sequential(model, methods.wanda(0.5), [x])
    assert torch.equal(x, kept) or torch.equal(x, nn.functional.elu(kept))  # the model's own doing
    expected = make()
    with torch.no_grad():
        first = expected[0][1].weight
        norms = nn.functional.elu(kept).square().mean(0).sqrt()
        order = (first.abs() * norms).argsort(1)[:, :2]
        first.scatter_(1, order, 0.0)
        hidden = nn.functional.elu(nn.functional.elu(expected[0][1](nn.functional.elu(kept))))
        norms = hidden.square().mean(0).sqrt()
        second = expected[2][1].weight
        second.scatter_(1, (second.abs() * norms).argsort(1)[:, :3], 0.0)
    assert torch.equal(masks["0.1.weight"], first != 0)
    assert torch.equal(masks["2.1.weight"], second != 0)


def test_weights_are_as_they_were_after_an_error():
    model = stack()
    with torch.no_grad():
        model.blocks[2].right.weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotFiniteError, match=r"blocks\.2\.right\.weight"):
        prune_sequential(model, methods.sparsegpt(0.5), data())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_several_updates_of_one_block():
    method = compose(scores.wanda(), schedule=schedules.iterative(0.75, 2, 1))
    masks = prune_sequential(stack(), method, data())
    assert all(int(mask.sum()) == mask.numel() // 4 for mask in masks.values())


class Crossed(Stack):
    def forward(self, x, scale=1.0):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale, use_cache=False)[0] + 1
        return self.head(x)


class Twice(Stack):
    def forward(self, x, scale=1.0):
        x = self.first(x)
        for block in (*self.blocks[:-1], self.blocks[1], self.blocks[2]):
            x, _ = block(x, scale, use_cache=False)
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (stack(), {"batches": []}, ValueRangeError, "gave no batch"),
        (stack(), {"blocks": "first"}, SiteError, "blocks='first' is no.*there are: 'blocks'"),
        (nn.Linear(2, 2), {}, SignalError, "without sequential=True"),
        (Crossed(), {"batches": [torch.ones(2, 4)]}, SignalError, "block 1 .Block. does not take"),
        (Twice(), {"batches": [torch.ones(2, 4)]}, SignalError, r"ran \[1, 2\] times for 1 batch"),
        (stack(), {"include": "head"}, SiteError, "hold none of the prunable weights"),
        (stack(), {"method": methods.snip(0.5)}, SignalError, "reads gradient, but block by block"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_remedy(model, given, error, message):
    given = {"batches": data(), "method": methods.wanda(0.5), **given}
    with pytest.raises(error, match=message):
        prune_sequential(model, given.pop("method"), given.pop("batches"), **given)


def test_sequential_needs_batches():
    with pytest.raises(SignalError, match="pass batches="):
        prune(stack(), methods.wanda(0.5), sequential=True)


def test_a_score_of_ones_own_on_inputs():
    score = Score("mine", lambda w, at: w.abs() * at[GRAM].diagonal(dim1=1, dim2=2), {GRAM})  # type: ignore[arg-type]
    method = compose(score, schedule=schedules.one_shot(0.5))
    assert len(prune_sequential(stack(), method, data())) == 6

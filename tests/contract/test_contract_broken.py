"""Every rule of every slot is shown to catch a part that breaks it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from prunus import checks, growth, methods, schedules, scores, solvers, structures
from prunus.core import Allocation, Growth, Schedule, Score, Solver, State, Structure, Update
from prunus.errors import ContractError, PrunusError, ShapeError, TargetError
from prunus.kinds import GRADIENT
from prunus.select import keep_top

COUNTER = iter(range(10**9))


def in_place(w, at):
    w.abs_()
    return w.clone()


def strided(w, at):
    return torch.as_strided(w, (w.numel(),), (1,)).reshape(w.shape).abs()


VALUES = {
    "needs": lambda w, at: at["hessian"],
    "shape": lambda w, at: w.abs().reshape(-1),
    "dtype": lambda w, at: (w > 0).int(),
    "finite": lambda w, at: (w - 2).log(),
    "nan": lambda w, at: w.nan_to_num().abs(),
    "strides": strided,
    "same": lambda w, at: w.abs() + next(COUNTER),
    "pure": in_place,
}
SCORES = {rule: Score("mine", value) for rule, value in VALUES.items()} | {"type": "magnitude"}
GROWTH = {rule: Growth("mine", value, lambda t: 0.1) for rule, value in VALUES.items()} | {
    "type": growth.random,
    "turnover": Growth("mine", lambda w, at: w.abs(), lambda t: 1.0 + t),
    "fill": Growth("mine", lambda w, at: w.abs(), lambda t: 0.1, fill=lambda w, at: w.double()),
}

ELEMENT = structures.element()
PAIRS = structures.block(1, 2)


def accept_nothing(shape):
    raise ShapeError("no")


STRUCTURES = {
    "type": structures.element,
    "refusal": replace(ELEMENT, layout=accept_nothing),
    "layout": replace(ELEMENT, layout=lambda shape: (1, math.prod(shape), 2)),
    "reduce": replace(ELEMENT, reduce=lambda score: score.reshape(-1)),
    "strides": replace(
        ELEMENT,
        reduce=lambda s: torch.as_strided(s, (s.numel(),), (1,)).reshape(1, -1),
    ),
    "expand": replace(ELEMENT, expand=lambda keep, shape: keep.reshape(shape).float()),
    "partition": replace(
        PAIRS,
        expand=lambda keep, shape: (
            keep.repeat_interleave(2).reshape(shape)
            & (torch.arange(math.prod(shape)) % 2 == 0).reshape(shape)
        ),
    ),
    "inverse": replace(ELEMENT, expand=lambda keep, shape: keep.flip(1).reshape(shape)),
    "local": replace(
        ELEMENT, reduce=lambda s: (s / s.sum().clamp(min=1e-6) if s.numel() else s).reshape(1, -1)
    ),
    "outputs": replace(structures.channel(1), outputs=1),
    "pinned": replace(structures.n_of_m(2, 4), pinned=0.4),
    "same": replace(ELEMENT, reduce=lambda s: s.reshape(1, -1) + next(COUNTER)),
    "pure": replace(ELEMENT, reduce=lambda s: s.mul_(2).reshape(1, -1)),
}


def even(sites, sparsity):
    return {site.name: sparsity for site in sites}


def by_mean(sites, given, sparsity):
    """Read scores without saying so."""
    assert sum(float(given[site.name].sum()) for site in sites) > -1
    return even(sites, sparsity)


def in_place_share(sites, given, sparsity):
    for site in sites:
        given[site.name].zero_()
    return even(sites, sparsity)


def always_refuse(sites, given, sparsity):
    raise TargetError("no")


ALLOCATIONS = {
    "type": "uniform",
    "names": Allocation("mine", lambda sites, given, s: even(sites[:-1], s)),
    "range": Allocation("mine", lambda sites, given, s: even(sites, 2 * s - 3)),
    "total": Allocation("mine", lambda sites, given, s: even(sites, s / 2)),
    "compares": Allocation("mine", by_mean),
    "same": Allocation("mine", lambda sites, given, s: even(sites, s + 1e-9 * next(COUNTER))),
    "pure": Allocation("mine", in_place_share, compares=True),
}
SCHEDULES = {
    "type": schedules.cubic,
    "range": Schedule("mine", lambda step: 90.0 if step == 3 else None, final=0.9, last=3),
    "some": Schedule("mine", lambda step: None, final=0.9),
    "final": Schedule("mine", lambda step: 0.5 if step == 3 else None, final=0.9, last=4),
    "after": Schedule("mine", lambda step: 0.9, final=0.9, last=4),
    "gradual": Schedule("mine", lambda step: 0.1 * min(step, 9), final=0.9),
    "same": Schedule("mine", lambda step: 0.5 + 1e-9 * next(COUNTER), final=0.5, gradual=True),
}
TOP = solvers.top_k().solve


def solve_random(w, given, k, structure, at):
    return structure.expand(keep_top(torch.rand_like(given), k), tuple(w.shape)), None


def solve_first(w, given, k, structure, at):
    keep = torch.zeros_like(given, dtype=torch.bool)
    keep[:, :k] = True
    return structure.expand(keep, tuple(w.shape)), None


def solve_in_place(w, given, k, structure, at):
    given.neg_()
    return TOP(w, given, k, structure, at)


def solve_unstable(w, given, k, structure, at):
    return TOP(w, given, k, structure, at)[0], w + next(COUNTER)


def solve_parts(w, given, k, structure, at):
    """Keep one element less of the first block that is kept."""
    mask = TOP(w, given, k, structure, at)[0]
    if structure.name.startswith("block") and k:
        mask.view(-1)[mask.reshape(-1).nonzero()[0]] = False
    return mask, None


SOLVERS = {
    "type": solvers.top_k,
    "shift": Solver("mine", TOP, shift=lambda w, new, at: w.flatten()),
    "needs": Solver("mine", lambda w, s, k, structure, at: (at["hessian"] > 0, None)),
    "mask": Solver("mine", lambda w, s, k, st, at: (TOP(w, s, k, st, at)[0].float(), None)),
    "count": Solver("mine", lambda w, s, k, st, at: TOP(w, s, min(k + 1, s.shape[1]), st, at)),
    "off": Solver("mine", solve_first),
    "weights": Solver("mine", lambda w, s, k, st, at: (TOP(w, s, k, st, at)[0], w / 0)),
    "same": Solver("mine", solve_unstable),
    "pure": Solver("mine", solve_in_place),
}

GOOD = methods.gradual_magnitude(0.5, 20)


def updating(change):
    """A method that does what GOOD does, and then something else."""

    def update(state, sites, weights, signals):
        return change(GOOD.update(state, sites, weights, signals), weights)

    return replace(GOOD, update=update)


def rename(result, weights):
    masks = {f"x.{name}": mask for name, mask in result.state.masks.items()}
    return Update(replace(result.state, masks=masks))


def zero_weights(result, weights):
    for w in weights.values():
        w.zero_()
    return result


def shuffled(result, weights):
    masks = {
        name: mask.reshape(-1)[torch.randperm(mask.numel())].reshape(mask.shape)
        for name, mask in result.state.masks.items()
    }
    return Update(replace(result.state, masks=masks))


class Forgetful:
    """Keeps a counter outside of State, which starts again after a resume or a second run."""

    def __init__(self):
        self.calls = 0

    def update(self, state, sites, weights, signals):
        self.calls += 1
        result = GOOD.update(state, sites, weights, signals)
        masks = {n: m.roll(self.calls, 1) for n, m in result.state.masks.items()}
        return Update(replace(result.state, masks=masks))


def remember_in_masks(state, sites, weights, signals):
    """Hides memory where a checkpoint does not carry it."""
    result = GOOD.update(state, sites, weights, signals)
    hidden = getattr(state.masks, "hidden", 0) + 1
    masks = Hiding({n: m.roll(hidden, 1) for n, m in result.state.masks.items()})
    masks.hidden = hidden
    return Update(replace(result.state, masks=masks))


class Hiding(dict):
    hidden = 0


def ignore_nan(state, sites, weights, signals):
    clean = {name: w.nan_to_num() for name, w in weights.items()}
    return GOOD.update(state, sites, clean, signals)


SPARSIFIERS = {
    "type": GOOD.update,
    "init": replace(GOOD, init=lambda sites, weights, seed: State(seed=0)),
    "needs": replace(GOOD, needs=lambda state: {"gradient"}),
    "update": updating(lambda result, weights: Update(replace(result.state, round=0))),
    "masks": updating(rename),
    "reached": replace(GOOD, target=0.9),
    "reported": updating(lambda result, w: Update(replace(result.state, sparsity={}))),
    "end": replace(GOOD, last=5, target=None),
    "resume": replace(GOOD, update=remember_in_masks),
    "nan": replace(GOOD, init=lambda sites, w, seed: State(seed=seed), update=ignore_nan),
    "same": replace(GOOD, update=Forgetful().update),
    "pure": updating(zero_weights),
}
BROKEN = {
    "score": (checks.check_score, SCORES),
    "growth": (checks.check_growth, GROWTH),
    "structure": (checks.check_structure, STRUCTURES),
    "allocation": (checks.check_allocation, ALLOCATIONS),
    "schedule": (checks.check_schedule, SCHEDULES),
    "solver": (checks.check_solver, SOLVERS),
    "sparsifier": (checks.check_sparsifier, SPARSIFIERS),
}
ROWS = [
    pytest.param(slot, rule, check, part, id=f"{slot}-{rule}")
    for slot, (check, table) in BROKEN.items()
    for rule, part in table.items()
]


def magnitude(w, at):
    return w.abs()


def step_on(result, weights):
    return Update(result.state.next_step())


MORE = [
    ("score", "needs", Score("mine", lambda w, at: w.abs(), needs={GRADIENT})),
    ("score", "type", Score("", lambda w, at: w.abs())),
    ("score", "pure", Score("mine", lambda w, at: torch.rand_like(w) * 0 + w.abs())),
    ("score", "pure", Score("mine", lambda w, at: w.abs() + 0 * random.random())),
    ("score", "nan", Score("mine", lambda w, at: at[GRADIENT].nan_to_num(), frozenset({GRADIENT}))),
    ("score", "shape", Score("mine", lambda w, at: w.tolist())),
    ("structure", "refusal", replace(ELEMENT, layout=lambda shape: (1, shape[2], 1))),
    ("structure", "partition", replace(PAIRS, expand=lambda keep, shape: torch.ones(
        shape, dtype=torch.bool))),
    ("structure", "reduce", replace(ELEMENT, reduce=lambda s: (s / s.abs().max() * 0 / 0).reshape(
        1, -1) if s.numel() else s.reshape(1, -1))),
    ("structure", "pure", replace(ELEMENT, expand=lambda keep, s: keep.logical_not_().reshape(s))),
    ("structure", "pinned", replace(ELEMENT, pinned=50.0)),
    ("allocation", "total", Allocation("mine", always_refuse)),
    ("solver", "count", Solver("mine", solve_parts)),
    ("solver", "pure", Solver("mine", solve_random)),
    ("solver", "mask", Solver("mine", lambda w, s, k, st, at: TOP(w, s, k, st, at)[0])),
    ("growth", "turnover", Growth("mine", magnitude, lambda t: next(COUNTER) % 97 / 97)),
    ("growth", "fill", Growth("mine", magnitude, lambda t: 0.1, fill=lambda w, at: w / 0)),
    ("sparsifier", "pure", updating(shuffled)),
    ("sparsifier", "needs", replace(GOOD, needs=lambda s: frozenset({f"signal {next(COUNTER)}"}))),
    ("sparsifier", "masks", updating(lambda r, w: Update(replace(
        r.state, masks={n: m.float() for n, m in r.state.masks.items()})))),
    ("sparsifier", "masks", updating(lambda r, w: Update(replace(
        r.state, masks={n: m.reshape(-1) for n, m in r.state.masks.items()})))),
    ("sparsifier", "update", updating(step_on)),
    ("sparsifier", "update", updating(lambda r, w: Update(replace(r.state, seed=77)))),
    ("sparsifier", "update", updating(lambda r, w: r.state)),
]  # fmt: skip


@pytest.mark.parametrize(("slot", "rule", "check", "part"), ROWS)
def test_a_broken_part_is_caught_with_rule_and_repair(slot, rule, check, part):
    with pytest.raises(ContractError) as caught:
        check(part)
    message = str(caught.value)
    assert f"breaks the rule {rule!r}" in message
    assert checks.RULES[slot][rule] in message
    assert message.startswith(slot)


@pytest.mark.parametrize(("slot", "rule", "part"), MORE)
def test_further_ways_to_break_a_rule(slot, rule, part):
    with pytest.raises(ContractError, match=f"breaks the rule '{rule}'"):
        BROKEN[slot][0](part)


def test_every_rule_has_a_part_that_breaks_it():
    assert {slot: set(table) for slot, (_, table) in BROKEN.items()} == {
        slot: set(rules) for slot, rules in checks.RULES.items()
    }


def test_every_check_is_listed():
    named = {name for name in checks.__all__ if name.startswith("check_")}
    assert named == {f"check_{slot}" for slot in checks.RULES}


def test_a_contract_error_is_an_assertion_and_one_of_ours():
    assert issubclass(ContractError, AssertionError)
    assert issubclass(ContractError, PrunusError)


def test_global_random_state_is_as_before_after_a_check():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checks.check_score(scores.random())
    checks.check_sparsifier(methods.random_pruning(0.5))
    assert torch.equal(before, torch.get_rng_state())


def test_own_signals_can_be_given_to_the_check():
    gram = Score("gram", lambda w, at: w.abs() * at["gram"].diagonal(), frozenset({"gram"}))
    checks.check_score(
        gram,
        shapes=[(4, 6), (2, 1)],
        signal=lambda kind, w: torch.eye(w.shape[1], dtype=w.dtype) + 1,
    )


def test_structure_type_is_frozen():
    assert isinstance(ELEMENT, Structure)
    with pytest.raises(AttributeError):
        ELEMENT.name = "x"  # pyright: ignore[reportAttributeAccessIssue]

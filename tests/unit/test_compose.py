from __future__ import annotations

import math
import sys

import pytest
import torch

from prunus import allocations, growth, schedules, scores, solvers, structures
from prunus.compose import REFUSALS, compose
from prunus.core import Growth, Schedule, Score, Signals, Site, Solver, State, Structure
from prunus.errors import CompositionError, NotFiniteError, ShapeError, SignalError, TargetError
from prunus.rng import uniform
from prunus.select import keep_top

MAGNITUDE = scores.magnitude()
SITES = (Site("a", (8, 8)), Site("b", (4, 16)))


def weights(key="w"):
    return {s.name: uniform((key, s.name), s.shape) * 2 - 1 for s in SITES}


def start(method, sites=SITES, given=None, seed=0):
    return method.init(sites, weights() if given is None else given, seed)


def update(method, state, given=None, signals=None, sites=SITES):
    return method.update(state, sites, given or weights(), signals or Signals())


def kept(state, name):
    return int(state.masks[name].sum())


# --- what may not be combined -----------------------------------------------------------------

TWO_OF_FOUR = structures.n_of_m(2, 4)
GROW = growth.random(growth.fixed(0.1))
CONSTANT = schedules.constant(0.5, 1, 9)
OTHER_SOLVER = Solver("repairing", solvers.top_k().solve)
COUNTS_BYTES = allocations.by_bytes(allocations.uniform())
REFUSED = [
    ({"structure": TWO_OF_FOUR, "schedule": schedules.one_shot(0.9)}, "0.5.*leave the schedule"),
    ({"structure": TWO_OF_FOUR, "schedule": schedules.cubic(0.5, 0, 9)}, "use one_shot"),
    ({"structure": TWO_OF_FOUR, "allocation": allocations.erk()}, "use uniform"),
    (
        {
            "structure": TWO_OF_FOUR,
            "schedule": CONSTANT,
            "grow": growth.momentum(growth.fixed(0.1)),
        },
        "redistribute=False",
    ),
    ({"allocation": allocations.global_(), "schedule": CONSTANT, "grow": GROW}, "use .*erk"),
    (
        {
            "allocation": allocations.global_(),
            "schedule": schedules.cubic(0.5, 0, 9),
            "grow": growth.momentum(growth.fixed(0.1)),
        },
        "set the first mask only",
    ),
    ({"schedule": CONSTANT, "grow": GROW, "solve": OTHER_SOLVER}, "repairing; use top_k"),
    ({"schedule": CONSTANT, "grow": GROW, "rounds": 2}, "growth needs rounds=1"),
    ({"schedule": CONSTANT, "initial": MAGNITUDE, "rounds": 2}, "leave initial out"),
    ({"schedule": schedules.cyclic(0.5, 2, 2, 2)}, "pass revive=True"),
    ({"schedule": CONSTANT, "grow": GROW, "revive": True}, "leave one of them out"),
    ({"schedule": CONSTANT, "remember": True}, "pass revive=True too"),
    ({"schedule": CONSTANT, "allocation": COUNTS_BYTES, "rounds": 2}, "counts bytes.*rounds=1"),
    ({"schedule": CONSTANT, "allocation": COUNTS_BYTES, "grow": GROW}, "counts bytes; use uniform"),
    ({"schedule": schedules.threshold_ramp(0, 2, 4)}, "counts weights; use allocations.threshold"),
    ({"schedule": CONSTANT, "allocation": allocations.threshold(0.2)}, "use threshold_ramp"),
    (
        {"schedule": schedules.adaptive(0.5, 0, 4), "allocation": COUNTS_BYTES},
        "counts bytes.*does not adapt",
    ),
    ({"schedule": CONSTANT, "rounds": 0}, "at least one round, got 0"),
]


@pytest.mark.parametrize(("parts", "remedy"), REFUSED)
def test_what_may_not_be_combined_is_refused_with_the_remedy(parts, remedy):
    with pytest.raises(CompositionError, match=remedy):
        compose(MAGNITUDE, **parts)


def test_every_row_of_the_table_is_triggered_above(monkeypatch):
    assert len(REFUSED) == len(REFUSALS)
    for row, (parts, remedy) in zip(REFUSALS, REFUSED, strict=True):
        monkeypatch.setattr(sys.modules["prunus.compose.slots"], "REFUSALS", (row,))
        with pytest.raises(CompositionError, match=remedy):
            compose(MAGNITUDE, **parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"structure": structures.element},
            r"structure is a Structure.*call it: structure=element",
        ),
        ({"allocation": allocations.erk}, r"allocation=erk\(\.\.\.\)"),
        ({"schedule": 0.9}, "schedule is a Schedule, got 0.9"),
        ({"grow": growth.random}, r"grow=random\(\.\.\.\)"),
        ({"solve": "obs"}, "solve is a Solver, got 'obs'"),
        ({"initial": torch.abs}, "initial is a Score"),
    ],
)
def test_a_slot_that_is_no_slot_is_refused(parts, message):
    with pytest.raises(CompositionError, match=message):
        compose(MAGNITUDE, **{"schedule": CONSTANT, **parts})


def test_a_bare_function_as_score_gets_the_code_to_write():
    with pytest.raises(CompositionError, match=r"write: Score\('mine', lambda w, at: w\.abs\(\)\)"):
        compose(torch.abs, schedule=CONSTANT)


def test_no_schedule_is_refused_unless_the_structure_pins_one():
    with pytest.raises(CompositionError, match=r"schedule=schedules\.one_shot"):
        compose(MAGNITUDE)
    method = compose(MAGNITUDE, structure=TWO_OF_FOUR)
    assert method.target == 0.5
    assert method.last == 0


def test_the_name_lists_the_parts():
    method = compose(MAGNITUDE, schedule=CONSTANT, grow=GROW)
    assert (
        method.name
        == "compose(magnitude, element, uniform, constant(0.5, every=1, stop=9), random)"
    )
    assert compose(MAGNITUDE, schedule=CONSTANT, name="mine").name == "mine"


# --- what an update does ----------------------------------------------------------------------


def test_without_growth_what_is_off_stays_off_whatever_the_score_says():
    upside_down = Score("random again", lambda w, at: uniform(at.key, tuple(w.shape)))
    method = compose(upside_down, schedule=schedules.linear(0.9, 0, 20))
    state = start(method)
    for step in range(21):
        before = state.masks
        state = update(method, state, weights(step)).state
        for name, mask in before.items():
            assert not bool((state.masks[name] & ~mask).any())
        state = state.next_step()
    assert kept(state, "a") + kept(state, "b") == 13


def test_scores_of_minus_infinity_do_not_bring_back_what_is_off():
    """log |w| of a weight that is kept and exactly zero ties with what is off."""
    score = Score("log", lambda w, at: w.abs().log())
    method = compose(score, schedule=schedules.iterative(0.5, 2, 1))
    given = {"a": torch.zeros(1, 8)}
    site = (Site("a", (1, 8)),)
    mask = torch.tensor([[False, False, True, True, True, True, True, True]])
    state = State(step=1, masks={"a": mask})
    state = method.update(state, site, given, Signals()).state
    assert state.masks["a"].tolist() == [[False, False, True, True, True, True, False, False]]


def test_growth_is_exact_also_where_the_ranking_is_minus_infinity():
    dead = Growth("dead", lambda w, at: torch.full_like(w, -math.inf), growth.fixed(0.5))
    method = compose(MAGNITUDE, schedule=CONSTANT, grow=dead, initial=scores.random())
    state = update(method, start(method)).state.next_step()
    after = update(method, state).state
    for name in ("a", "b"):
        assert int((after.masks[name] & ~state.masks[name]).sum()) == 16
        assert int((~after.masks[name] & state.masks[name]).sum()) == 16


def test_growth_in_rows_keeps_every_row_exact():
    """A constant fan-in, which has no pinned sparsity, keeps k of each row through every move."""
    fan_in = Structure(
        "fan_in",
        layout=lambda shape: (shape[0], math.prod(shape[1:]), 1),
        reduce=lambda score: score.reshape(score.shape[0], -1),
        expand=lambda keep, shape: keep.reshape(shape),
    )
    method = compose(
        MAGNITUDE, structure=fan_in, schedule=CONSTANT, grow=GROW, initial=scores.random()
    )
    state = start(method)
    for step in range(5):
        before = state.masks
        state = update(method, state, weights(step)).state
        assert (state.masks["a"].sum(1) == 4).all()
        assert (state.masks["b"].sum(1) == 8).all()
        if step:
            assert (((state.masks["b"] & ~before["b"]).sum(1)) == 0).all()  # int(0.1 * 8) = 0
        state = state.next_step()
    lively = compose(
        MAGNITUDE,
        structure=fan_in,
        schedule=CONSTANT,
        grow=growth.random(growth.fixed(0.25)),
        initial=scores.random(),
    )
    state = update(lively, start(lively)).state.next_step()
    after = update(lively, state).state
    assert ((after.masks["a"] & ~state.masks["a"]).sum(1) == 1).all()
    assert ((after.masks["a"]).sum(1) == 4).all()


def test_a_fill_gives_values_to_what_is_grown_and_to_nothing_else():
    filled = Growth(
        "filled", lambda w, at: uniform(at.key, tuple(w.shape)), growth.fixed(0.25),
        fill=lambda w, at: torch.full_like(w, 7.0),
    )  # fmt: skip
    method = compose(MAGNITUDE, schedule=CONSTANT, grow=filled, initial=scores.random())
    first = update(method, start(method))
    given = {name: w * first.state.masks[name] for name, w in weights().items()}
    result = update(method, first.state.next_step(), given)
    for name, new in result.weights.items():
        grown = result.state.masks[name] & ~first.state.masks[name]
        assert bool((new[grown] == 7).all())
        assert torch.equal(new[~grown], given[name][~grown])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 1)])
def test_n_of_m_in_every_group(n, m):
    method = compose(MAGNITUDE, structure=structures.n_of_m(n, m))
    state = update(method, start(method)).state
    for site in SITES:
        mask = state.masks.get(site.name, torch.ones(site.shape, dtype=torch.bool))
        assert (mask.reshape(-1, m).sum(1) == n).all()


def test_rounds_approach_the_target_in_equal_factors():
    method = compose(MAGNITUDE, schedule=schedules.one_shot(0.9), rounds=4)
    state, counts = start(method), [128]
    while method.needs(state) is not None:
        state = update(method, state).state
        counts.append(kept(state, "a") + kept(state, "b"))
    assert len(counts) == 5
    for done, count in enumerate(counts):
        assert abs(count - 128 * 0.1 ** (done / 4)) <= 1
    assert state.round == 4


def test_a_channel_mask_is_whole_channels():
    method = compose(MAGNITUDE, structure=structures.channel(1), schedule=schedules.one_shot(0.5))
    masks = update(method, start(method)).state.masks
    assert all(bool((mask == mask[:1]).all()) for mask in masks.values())


def test_initial_scores_the_first_mask_only():
    method = compose(
        Score("gradient", lambda w, at: at["gradient"].abs(), frozenset({"gradient"})),
        schedule=CONSTANT,
        initial=scores.random(),
    )
    state = start(method)
    assert method.needs(state) == frozenset()
    state = update(method, state).state.next_step()
    assert method.needs(state) == frozenset({"gradient"})


def test_a_dense_site_has_no_mask():
    method = compose(
        MAGNITUDE,
        schedule=schedules.one_shot(0.25),
        allocation=allocations.overrides(allocations.uniform(), {"a": 0.0}),
    )
    state = update(method, start(method)).state
    assert set(state.masks) == {"b"}
    assert state.sparsity == {"a": 0.0, "b": 0.5}


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    method = compose(MAGNITUDE, schedule=CONSTANT)
    bad = weights()
    bad["b"][3, 3] = value
    with pytest.raises(NotFiniteError, match=r"'b' \(shape \(4, 16\)\)"):
        start(method, given=bad)


def test_nan_of_a_signal_is_refused_by_name():
    method = compose(scores.taylor(), schedule=CONSTANT)
    gradients = {s.name: torch.ones(s.shape) for s in SITES}
    gradients["a"][0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="'a'"):
        update(method, start(method), signals=Signals({"gradient": gradients}))


def test_a_signal_that_nobody_gave_is_an_error():
    method = compose(scores.snip(), schedule=CONSTANT)
    with pytest.raises(SignalError, match="'a' has no signal 'gradient'"):
        update(method, start(method))


def test_a_score_of_the_wrong_shape_names_score_and_site():
    method = compose(Score("flat", lambda w, at: w.flatten()), schedule=CONSTANT)
    with pytest.raises(CompositionError, match=r"flat returned \(64,\) for 'a'.*\(8, 8\)"):
        update(method, start(method))


def test_a_shape_that_does_not_divide_names_the_site_at_init():
    method = compose(MAGNITUDE, structure=structures.block(8, 1), schedule=CONSTANT)
    with pytest.raises(ShapeError, match=r"site 'b': block\(8, 1\).*4 x 16"):
        start(method)


def test_a_target_below_what_is_reached_already_is_an_error_that_names_the_sites():
    down = Schedule("down", lambda step: 0.5 if step else 0.9, final=0.5, last=1, gradual=True)
    method = compose(MAGNITUDE, schedule=down)
    state = update(method, start(method)).state.next_step()
    with pytest.raises(TargetError, match=r"asked for a sparsity of 0\.5.*a 0\.89.*b 0\.90"):
        update(method, state)


def test_a_solver_that_keeps_too_much_is_found_out():
    def keep_more(w, given, k, structure, at):
        return structure.expand(keep_top(given, k + 2), tuple(w.shape)), None

    method = compose(MAGNITUDE, schedule=CONSTANT, solve=Solver("greedy", keep_more))
    with pytest.raises(TargetError, match=r"one unit is 1 of 128"):
        update(method, start(method))


def test_new_weights_of_a_solver_are_handed_on():
    def doubling(w, given, k, structure, at):
        return structure.expand(keep_top(given, k), tuple(w.shape)), w * 2

    method = compose(MAGNITUDE, schedule=CONSTANT, solve=Solver("doubling", doubling))
    result = update(method, start(method))
    assert torch.equal(result.weights["a"], weights()["a"] * 2)


def test_nothing_is_due_between_updates():
    method = compose(MAGNITUDE, schedule=schedules.one_shot(0.5, step=3))
    state = start(method)
    assert method.needs(state) is None
    assert update(method, state).state == state


def test_a_forgotten_call_is_named():
    with pytest.raises(CompositionError, match=r"call it: score=magnitude"):
        compose(scores.magnitude, schedule=schedules.one_shot(0.5))

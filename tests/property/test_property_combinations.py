"""Any score, shape, budget, schedule, growth, solver: it runs and keeps its count, or says no."""

# The tables live with the contract; an error is checked where it is sorted.
# ruff: noqa: PT017
from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from test_contract_slots import ALLOCATIONS, GROWTH, SCHEDULES, SCORES, SOLVERS, STRUCTURES

from prunus.checks.probes import default_signal
from prunus.compose import REFUSALS, compose
from prunus.compose.slots import Slots
from prunus.core import Signals, Site
from prunus.errors import CompositionError, ShapeError, SiteError, TargetError, ValueRangeError
from prunus.rng import uniform
from prunus.solvers import top_k

SITES = (
    Site("a.weight", (8, 12)),
    Site("b.weight", (12, 8), transposed=True),
    Site("c.weight", (4, 8, 3, 3)),
)


def flat(table):
    return [part for row in table.values() for part in (row if isinstance(row, list) else [row])]


def fitting(structure):
    """The sites that a structure accepts."""
    found = []
    for site in SITES:
        shape = (site.shape[1], site.shape[0]) if site.transposed else site.shape
        try:
            structure.layout(shape)
        except ShapeError:
            continue
        found.append(site)
    return tuple(found)


combinations = st.fixed_dictionaries(
    {
        "score": st.sampled_from(flat(SCORES)),
        "structure": st.sampled_from(flat(STRUCTURES)),
        "allocation": st.sampled_from(flat(ALLOCATIONS)),
        "schedule": st.sampled_from(flat(SCHEDULES)),
        "grow": st.one_of(st.none(), st.sampled_from(flat(GROWTH))),
        "solve": st.one_of(st.none(), st.none(), st.sampled_from(flat(SOLVERS))),
        "revive": st.booleans(),
    }
)


def signals_of(needs, sites, weights, step):
    kinds = {kind: {s.name: default_signal(kind, weights[s.name]) for s in sites} for kind in needs}
    return Signals(kinds, loss=1.0 + step % 3)


def pattern(reason):
    """Every word of a reason in its order; what it fills in may be anything."""
    return ".*".join(re.escape(part) for part in re.split(r"\{[^}]*\}", reason))


def refused(parts, error):
    """Whether an error is one of the documented refusals, word for word."""
    slots = Slots(
        parts["score"],
        parts["structure"],
        parts["allocation"],
        parts["schedule"],
        parts["grow"],
        parts["solve"] or top_k(),
        None,
        1,
        parts["revive"],
    )
    return any(
        check(slots) and re.search(pattern(reason), str(error), re.DOTALL)
        for check, reason in REFUSALS
    )


def run(parts):
    """Run a combination; returns what came of it: a refusal, an error, or the steps it ran."""
    try:
        method = compose(**parts)
    except CompositionError as error:
        assert refused(parts, error), f"undocumented refusal: {error}"
        return "refused"
    sites = fitting(parts["structure"])
    if not sites:
        return "no site"
    weights = {s.name: uniform((s.name, "w"), s.shape) + 0.01 for s in sites}
    total = sum(s.size for s in sites)
    layouts = [
        parts["structure"].layout((s.shape[1], s.shape[0]) if s.transposed else s.shape)
        for s in sites
    ]
    grain = max(rows * unit for rows, _, unit in layouts)
    measured = parts["allocation"].measure != "weights"
    reached, lowest = 0.0, float("inf")
    try:
        state = method.init(sites, weights, 0)
        for step in range(min(12, (method.last or 0) + 1)):
            needs = method.needs(state)
            if needs is not None:
                asked = parts["schedule"].at(state.step)
                signals = signals_of(needs, sites, weights, step)
                if asked is not None and parts["schedule"].adapt is not None:
                    lowest = min(lowest, signals.loss)
                    asked = parts["schedule"].adapt(reached, signals.loss, lowest)
                result = method.update(state, sites, weights, signals)
                state = result.state
                off = sum(int((~m).sum()) for m in state.masks.values())
                if asked is not None and not measured:
                    assert abs(off - asked * total) <= grain * (1 + 1e-6), (off, asked * total)
                reached = off / total
                for s in sites:  # what was asked of each site is what its mask has
                    mask = state.masks.get(s.name)
                    kept = s.size if mask is None else int(mask.sum())
                    if asked is not None:
                        assert abs(s.size - kept - state.sparsity[s.name] * s.size) < 1e-6 * s.size
                for name, w in result.weights.items():
                    weights[name] = w.clone()
            assert all(m.dtype == torch.bool for m in state.masks.values())
            for s in sites:
                mask = state.masks.get(s.name)
                drift = (uniform((s.name, step), s.shape) - 0.5) * 0.1
                weights[s.name] = weights[s.name] + drift
                if mask is not None:
                    assert mask.shape == s.shape
                    weights[s.name] = weights[s.name] * mask
            state = state.next_step()
    except TargetError as error:  # a budget that cannot be met, or a ramp held back by a floor
        assert any(s.name in str(error) for s in sites) or "removes at least" in str(error), error
        return "target"
    except SiteError as error:
        assert "matches no site" in str(error), error
        return "site"
    except ValueRangeError as error:
        assert "has no table for site" in str(error), error
        return "table"
    except ShapeError as error:
        assert any(s.name in str(error) for s in sites) or "structure" in str(error), error
        return "shape"
    return "ran"


@given(combinations)
@settings(max_examples=150)
def test_every_combination_runs_or_is_refused_with_a_reason(parts):
    run(parts)


@pytest.mark.slow
@given(combinations)
@settings(max_examples=3000)
def test_many_more_combinations(parts):
    run(parts)


def test_the_property_sees_all_outcomes():
    """The first parts of each slot, by pairs: most run, and refusals are the documented ones."""
    base = {
        "score": flat(SCORES)[11],
        "structure": STRUCTURES["element"][0],
        "allocation": ALLOCATIONS["uniform"][0],
        "schedule": SCHEDULES["one_shot"][0],
        "grow": None,
        "solve": None,
        "revive": False,
    }
    seen = []
    tables = {
        "score": SCORES,
        "structure": STRUCTURES,
        "allocation": ALLOCATIONS,
        "schedule": SCHEDULES,
        "grow": GROWTH,
    }
    firsts = {slot: flat(table) for slot, table in tables.items()}
    for slot, parts in firsts.items():
        for part in parts:
            seen.append(run({**base, slot: part}))
    for structure in firsts["structure"]:
        for allocation in firsts["allocation"]:
            seen.append(run({**base, "structure": structure, "allocation": allocation}))
    for schedule in firsts["schedule"]:
        for grow in [None, *firsts["grow"]]:
            for revive in (False, True):
                seen.append(run({**base, "schedule": schedule, "grow": grow, "revive": revive}))
    assert seen.count("ran") > 200
    assert seen.count("refused") > 50

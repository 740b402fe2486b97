from __future__ import annotations

import itertools

import pytest
import torch

from prunus import allocations, methods, scores
from prunus.combine import by_site, then
from prunus.compose import compose
from prunus.core import Schedule, Signals, Site
from prunus.drive.checkpoint import from_blob, to_blob
from prunus.errors import CompositionError, SiteError, TargetError
from prunus.rng import uniform

SITES = (Site("enc.0", (8, 8)), Site("enc.1", (8, 4)), Site("head", (4, 8), ("tied",)))


def weights(key="w"):
    return {s.name: uniform((key, s.name), s.shape) * 2 - 1 for s in SITES}


def run(method, steps, seed=0, state=None, begin=0):
    """Return the state after every step; weights are new at each step."""
    state = method.init(SITES, weights(), seed) if state is None else state
    history = []
    for step in range(begin, steps):
        while (needs := method.needs(state)) is not None:
            signals = Signals({kind: weights(f"g{step}") for kind in needs})
            state = method.update(state, SITES, weights(step), signals).state
        history.append(state)
        state = state.next_step()
    return history


def sparsity(state, name):
    return 1 - float(state.masks[name].float().mean()) if name in state.masks else 0.0


def test_each_site_follows_the_first_rule_that_matches():
    method = by_site(
        {
            "enc.1": methods.random_pruning(0.25),
            "enc": methods.one_shot_magnitude(0.5, step=2),
        }
    )
    states = run(method, 4)
    assert [sparsity(s, "enc.1") for s in states] == [0.25] * 4
    assert [sparsity(s, "enc.0") for s in states] == [0, 0, 0.5, 0.5]
    assert all("head" not in s.masks for s in states)
    assert states[-1].sparsity == {"enc.1": 0.25, "enc.0": 0.5}
    assert method.last == 2


def test_a_rule_also_matches_by_the_other_name_of_a_tied_weight():
    states = run(by_site({"tied": methods.random_pruning(0.5)}), 1)
    assert sparsity(states[0], "head") == 0.5


def test_a_rule_for_all_sites_equals_the_method_itself():
    plain = methods.gradual_magnitude(0.9, 20)
    combined = by_site({"*": plain})
    for one, other in zip(run(plain, 20), run(combined, 20), strict=True):
        assert one.masks.keys() == other.masks.keys()
        assert all(torch.equal(one.masks[n], other.masks[n]) for n in one.masks)


def test_needs_are_those_of_the_methods_that_are_due():
    method = by_site({"head": methods.snip(0.5), "*": methods.one_shot_magnitude(0.5, step=1)})
    state = method.init(SITES, weights(), 0)
    assert method.needs(state) == frozenset({"gradient"})
    history = run(method, 1)
    assert method.needs(history[0].next_step()) == frozenset()
    assert method.needs(history[0].next_step().next_step()) is None


def test_rules_are_refused_without_a_site_or_without_any():
    method = by_site({"*": methods.random_pruning(0.5), "head": methods.random_pruning(0.9)})
    with pytest.raises(SiteError, match=r"rule 'head' gets no site \(earlier rules.*enc\.0"):
        method.init(SITES, weights(), 0)
    with pytest.raises(CompositionError, match="at least one rule"):
        by_site({})


def test_an_endless_part_makes_the_whole_endless():
    always = Schedule("always", lambda step: 0.5, final=0.5)
    endless = compose(scores.magnitude(), schedule=always)
    assert by_site({"head": endless, "*": methods.random_pruning(0.5)}).last is None
    assert then(methods.random_pruning(0.5), 3, endless).last is None


# --- one after the other ----------------------------------------------------------------------


def test_the_second_method_goes_on_from_the_masks_of_the_first():
    method = then(methods.random_pruning(0.5), 3, methods.one_shot_magnitude(0.75, step=1))
    states = run(method, 7)
    assert method.last == 4
    assert method.target == 0.75
    for step, state in enumerate(states):
        for site in SITES:
            assert sparsity(state, site.name) == (0.75 if step >= 4 else 0.5)
    for name, mask in states[-1].masks.items():
        assert not bool((mask & ~states[0].masks[name]).any())


def test_a_second_method_that_needs_more_weights_than_are_left_is_refused():
    with pytest.raises(TargetError, match=r"asked for a sparsity of 0\.5"):
        run(then(methods.random_pruning(0.9), 2, methods.random_pruning(0.5)), 4)


def test_dynamic_training_can_follow_a_pruning_at_initialisation():
    sparse = methods.one_shot_magnitude(0.5, allocation=allocations.erk())
    method = then(sparse, 2, methods.rigl(0.5, 30, every=4))
    states = run(method, 20)
    counts = {name: int(mask.sum()) for name, mask in states[0].masks.items()}
    moved = 0
    for before, after in itertools.pairwise(states):
        for name, count in counts.items():
            assert int(after.masks[name].sum()) == count
            moved += int((after.masks[name] != before.masks[name]).sum())
    assert moved > 10


@pytest.mark.parametrize(
    "second",
    [
        by_site({"*": methods.random_pruning(0.75)}),
        then(methods.random_pruning(0.75), 1, methods.random_pruning(0.75)),
        then(methods.random_pruning(0.6), 2, by_site({"*": methods.random_pruning(0.75, step=1)})),
        by_site({"enc": methods.random_pruning(0.75), "*": methods.random_pruning(0.75, step=4)}),
    ],
    ids=["by_site", "then", "then-by_site", "by_site-two"],
)
def test_combinations_nest_with_clocks_and_masks_of_their_own(second):
    method = then(methods.one_shot_magnitude(0.5), 3, second)
    states = run(method, 12)
    assert sparsity(states[2], "enc.0") == 0.5
    for site in SITES:
        assert sparsity(states[-1], site.name) == 0.75
        assert not bool((states[-1].masks[site.name] & ~states[0].masks[site.name]).any())
    assert sparsity(states[3], "enc.0") > 0.5 or method.last > 3
    assert method.last is not None
    assert all(method.needs(state.next_step()) is None for state in states[method.last :])


@pytest.mark.parametrize("moment", [1, 4, 5, 9])
def test_a_nested_combination_resumes_exactly(moment):
    method = then(
        by_site({"enc": methods.set_(0.5, 6, every=2), "*": methods.random_pruning(0.5)}),
        4,
        by_site({"enc.0": methods.random_pruning(0.9, step=3), "*": methods.random_pruning(0.8)}),
    )
    whole = run(method, 12)
    state = from_blob(to_blob(whole[moment - 1].next_step()), SITES)
    rest = run(method, 12, state=state, begin=moment)
    for one, other in zip(whole[moment:], rest, strict=True):
        assert all(torch.equal(one.masks[n], other.masks[n]) for n in one.masks)


def test_then_needs_a_step_to_start_at():
    with pytest.raises(CompositionError, match="step 1 or later, got 0"):
        then(methods.random_pruning(0.5), 0, methods.random_pruning(0.6))


def test_names_tell_the_parts():
    a, b = methods.random_pruning(0.5), methods.snip(0.9)
    assert then(a, 5, b).name == "then(random_pruning(0.5, step=0), 5, snip(0.9))"
    assert by_site({"x": b}).name == "by_site({'x': snip(0.9)})"

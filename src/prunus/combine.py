"""Combine methods: each site its own, or one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from prunus.core import Signals, Site, Sparsifier, State, Update, Weights
from prunus.errors import CompositionError, SiteError
from prunus.sites import matches


def by_site(rules: Mapping[str, Sparsifier]) -> Sparsifier:
    """Give each site to the first rule whose pattern matches its name; others stay dense.

    rules: shell pattern or module prefix ("*" matches all) -> method. Raises SiteError when a rule
    gets no site. A rule names its sites: the outputs of a classifier go, too, if a rule of whole
    outputs holds for it. A gradual and a one-shot method, or two sparsities, go side by side.
    """
    if not rules:
        raise CompositionError("by_site needs at least one rule, e.g. {'encoder.*': method}")
    methods = list(rules.values())

    def split(sites: Sequence[Site]) -> list[list[Site]]:
        groups: list[list[Site]] = [[] for _ in rules]
        for site in sites:
            for group, pattern in zip(groups, rules, strict=True):
                if any(matches(name, [pattern]) for name in (site.name, *site.aliases)):
                    group.append(site)
                    break
        for group, pattern in zip(groups, rules, strict=True):
            if not group:
                raise SiteError(
                    f"rule {pattern!r} gets no site (earlier rules come first); "
                    f"sites: {', '.join(site.name for site in sites)}"
                )
        return groups

    def init(sites: Sequence[Site], weights: Weights, seed: int) -> State:
        children = tuple(
            method.init(group, weights, seed)
            for method, group in zip(methods, split(sites), strict=True)
        )
        return State(seed=seed, children=children)

    def needs(state: State) -> frozenset[str] | None:
        return _union(
            method.needs(_inherit(child, state))
            for method, child in zip(methods, state.children, strict=True)
        )

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        results = []
        for method, child, group in zip(methods, state.children, split(sites), strict=True):
            child = _inherit(child, state, [site.name for site in group])
            due = method.needs(child) is not None
            results.append(method.update(child, group, weights, signals) if due else Update(child))
        return _merge(state, results)

    name = ", ".join(f"{pattern!r}: {method.name}" for pattern, method in rules.items())
    return Sparsifier(
        f"by_site({{{name}}})",
        needs,
        init,
        update,
        last=_latest(methods),
        observes=any(method.observes for method in methods),
    )


def then(first: Sparsifier, step: int, second: Sparsifier) -> Sparsifier:
    """Run `first` before optimizer step `step`, and from there on `second`, whose steps start at 0.

    `second` starts from the masks that `first` left. Raises CompositionError if step < 1.
    """
    if step < 1:
        raise CompositionError(f"the second method starts at step 1 or later, got {step}")

    def needs(state: State) -> frozenset[str] | None:
        before, after = state.children
        if state.step < step:
            return first.needs(_inherit(before, state))
        return second.needs(_inherit(_moved(after, -step), state))

    def init(sites: Sequence[Site], weights: Weights, seed: int) -> State:
        children = (first.init(sites, weights, seed), second.init(sites, weights, seed))
        return State(seed=seed, children=children)

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        before, after = state.children
        if state.step < step:
            result = first.update(_inherit(before, state), sites, weights, signals)
            children = (result.state, after)
        else:
            start = _inherit(_moved(after, -step), state)
            result = second.update(start, sites, weights, signals)
            children = (before, _moved(result.state, step))
        _check_no_reserve([result])
        state = replace(
            state,
            round=state.round + 1,
            masks=result.state.masks,
            sparsity=result.state.sparsity,
            children=children,
        )
        return Update(state, result.weights, result.shifts)

    last = None if second.last is None else second.last + step
    name = f"then({first.name}, {step}, {second.name})"
    sees = first.observes or second.observes
    whole = first.whole or second.whole
    return Sparsifier(name, needs, init, update, second.target, last, sees, whole)


def _moved(state: State, steps: int) -> State:
    """Return the state on another clock, and the states inside it too."""
    children = tuple(_moved(child, steps) for child in state.children)
    return replace(state, step=state.step + steps, children=children)


def _inherit(child: State, state: State, names: Sequence[str] | None = None) -> State:
    """Let a method that has not acted yet start from the masks that are there already."""
    if child.masks:
        return child
    masks = state.masks if names is None else {n: m for n, m in state.masks.items() if n in names}
    return replace(child, masks=masks)


def _union(needs: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    due = [n for n in needs if n is not None]
    return frozenset().union(*due) if due else None


def _latest(methods: Sequence[Sparsifier]) -> int | None:
    lasts = [method.last for method in methods]
    return None if any(last is None for last in lasts) else max(last or 0 for last in lasts)


def _merge(state: State, results: Sequence[Update]) -> Update:
    _check_no_reserve(results)
    children = tuple(result.state for result in results)
    masks = {name: mask for child in children for name, mask in child.masks.items()}
    sparsity = {name: s for child in children for name, s in child.sparsity.items()}
    weights = {name: w for result in results for name, w in result.weights.items()}
    merged = replace(
        state, round=state.round + 1, masks=masks, sparsity=sparsity, children=children
    )
    shifts = {name: s for result in results for name, s in result.shifts.items()}
    return Update(merged, weights, shifts)


def _check_no_reserve(results: Sequence[Update]) -> None:
    """Refuse what keeps values of weights that are off: there is one reserve, of the whole."""
    if any(result.state.trained for result in results):
        raise CompositionError(
            "a method that trains weights which are off (top_kast) cannot be combined with "
            "others; attach it alone, and exclude the sites that it should leave"
        )

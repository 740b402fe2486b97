"""Every rule that a part has to keep, with its repair: the text of the contract."""

from __future__ import annotations

from typing import Any

from prunus.errors import ContractError

_SAME = "the same inputs give the same output: draw random numbers with prunus.rng from at.key"
_PURE = (
    "write to nothing that is given and leave the global random state alone: copy before an "
    "in-place operation, draw with prunus.rng"
)
_VALUES = {
    "needs": "list every signal that `value` reads in `needs`, a frozenset of strings",
    "shape": "return a tensor with the shape of w",
    "dtype": "return a floating-point tensor",
    "finite": "finite weights and signals give no NaN: guard divisions and logarithms",
    "nan": "let a NaN of the weight or of a signal show in the result, so that it is refused",
    "strides": "do not depend on how w lies in memory: index it, do not view its storage",
    "same": _SAME,
    "pure": _PURE,
}

RULES: dict[str, dict[str, str]] = {
    "score": {"type": "build it as Score('name', lambda w, at: ...)", **_VALUES},
    "growth": {
        "type": "build it as Growth('name', value, turnover)",
        **_VALUES,
        "turnover": "turnover(step) is a fraction in [0, 1], a function of the step alone",
        "fill": "fill(w, at) returns finite values with the shape and dtype of w, or is None",
    },
    "structure": {
        "type": "build it as Structure('name', layout, reduce, expand)",
        "refusal": "layout refuses a shape with ShapeError and accepts at least one shape checked",
        "layout": "layout(shape) is (rows, units, elements per unit) and multiplies to prod(shape)",
        "reduce": "reduce(score) returns floats [rows, units] without NaN",
        "strides": "sum in one order: make the score contiguous before it is reduced",
        "expand": "expand(keep, shape) returns a bool tensor of that shape",
        "partition": "every element belongs to exactly one unit, and a unit has `unit` elements",
        "inverse": "reduce and expand number rows and units in the same order",
        "local": "a unit's score rises with the scores of its own elements and no others",
        "pinned": "pinned is None, or a sparsity that whole units of a row can have",
        "outputs": "so many outputs reduce and expand alone, units in the same order; 0: none do",
        "same": _SAME,
        "pure": _PURE,
    },
    "allocation": {
        "type": "build it as Allocation('name', share)",
        "names": "return a share for every site and for nothing else",
        "range": "a share is a float in [0, 1], the fraction that is removed",
        "total": "the shares remove `sparsity` of all elements within one unit, or TargetError",
        "compares": "set compares=True if share reads the scores",
        "same": _SAME,
        "pure": _PURE,
    },
    "schedule": {
        "type": "build it as Schedule('name', at, final)",
        "range": "at(step) is None or a sparsity in [0, 1]",
        "some": "at least one step has an update",
        "final": "the last update, at step `last`, reaches `final`",
        "after": "after `last` there is no update; leave last=None if it never ends",
        "gradual": "set gradual=True if it passes through sparsities other than `final`",
        "same": "at depends on the step alone, in whatever order it is asked",
    },
    "solver": {
        "type": "build it as Solver('name', solve)",
        "needs": "list every signal that `solve` reads in `needs`, a frozenset of strings",
        "mask": "return (mask, new w or None), the mask bool and shaped like w",
        "count": "keep exactly k whole units of each row: choose with prunus.select.keep_top",
        "off": "a unit that scores -inf is off: keep it only if all others are kept",
        "weights": "new weights are None, or finite with the shape and dtype of w",
        "shift": "shift(w, new, at) returns a finite tensor [outputs], or is None",
        "same": _SAME,
        "pure": _PURE,
    },
    "sparsifier": {
        "type": "build it with prunus.compose, or as Sparsifier(name, needs, init, update)",
        "init": "init(sites, weights, seed) returns a State at step 0 that carries the seed",
        "needs": "needs(state) is None, or a frozenset of signal names, and always the same",
        "update": "update returns an Update; its state keeps step and seed, and counts round up",
        "masks": "masks are bool, shaped like their sites, and named after sites",
        "reached": "after the last update `target` of all weights is off, within one unit",
        "reported": "state.sparsity holds what each site really reached, within one unit",
        "end": "after step `last` needs(state) is None; leave last=None if it never ends",
        "resume": "keep all memory in State: a run resumed from it goes on exactly the same",
        "nan": "refuse a NaN in the weights with NotFiniteError that names the site",
        "same": _SAME,
        "pure": _PURE,
    },
}
"""slot -> rule -> how to keep it. A ContractError carries the rule's name and this text."""


class Judge:
    """Holds one part to the rules of its slot."""

    def __init__(self, slot: str, part: Any) -> None:
        """slot: a key of RULES; part: what is checked, named in messages."""
        self.slot, self.name = slot, getattr(part, "name", None) or repr(part)

    def __call__(self, rule: str, kept: bool, found: str) -> None:
        """Raise ContractError unless `kept`; `found`: what was seen instead."""
        if not kept:
            raise ContractError(
                f"{self.slot} {self.name} breaks the rule {rule!r}: {found}; "
                f"repair: {RULES[self.slot][rule]}"
            )

"""The constitution: the values and the functions that every part of prunus agrees on.

Read this file first. It holds frozen values and function shapes only: no nn.Module, no in-place
write, no global random state. `True` in a mask means kept. `sparsity` is the fraction removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

from prunus.errors import SignalError

Masks: TypeAlias = Mapping[str, Tensor]
"""Parameter name -> bool tensor of the parameter's shape, True = kept. An absent name is dense."""

Weights: TypeAlias = Mapping[str, Tensor]
"""Parameter name -> detached weight tensor. Never written to."""

Scores: TypeAlias = Mapping[str, Tensor]
"""Parameter name -> float tensor [rows, units]; higher = keep. May compute on access."""


# --- what is sparse ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A prunable thing that gets a budget: one weight tensor, under all the names it has.

    name: its first name in `model.named_parameters()`; shape: of the tensor;
    aliases: further names of the same (tied) tensor; unit: elements that live or die together;
    rows: rows of units that keep the same count each, so that a site changes in steps of `grain`;
    transposed: inputs come first and outputs second (ConvTranspose, the Conv1D of GPT-2).
    """

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    unit: int = 1
    transposed: bool = False
    rows: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def grain(self) -> int:
        """Elements by which a site's count changes: one unit in every row."""
        return self.rows * self.unit


@dataclass(frozen=True)
class Signals:
    """What an update may look at beside the weights; each kind is present only if asked for."""

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    loss: float | None = None

    def at(self, site: str) -> dict[str, Tensor]:
        """Return {kind: tensor} of one site."""
        return {kind: values[site] for kind, values in self.tensors.items() if site in values}


@dataclass(frozen=True)
class State:
    """Everything a sparsifier remembers; all of it survives save and load.

    step: optimizer steps done; round: updates already done at this step; masks: what is kept now;
    sparsity: what the last update asked of each site; statistics: kind -> site -> tensor that a
    method accumulates; seed: of every random draw; children: states of combined sparsifiers;
    trained: where a gradient passes although the weight may be off (its value is in the statistic
    RESERVE); sites that are absent train what they keep.
    """

    seed: int = 0
    step: int = 0
    round: int = 0
    masks: Masks = field(default_factory=dict)
    sparsity: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    children: tuple[State, ...] = ()
    trained: Masks = field(default_factory=dict)

    def next_step(self) -> State:
        """Return the state after one more optimizer step."""
        children = tuple(child.next_step() for child in self.children)
        return replace(self, step=self.step + 1, round=0, children=children)


@dataclass(frozen=True)
class Update:
    """What an update decided: the next state, and what a solver rewrote (if anything).

    weights: of sites; shifts: site -> what is added to the bias of its layer, [outputs].
    """

    state: State
    weights: Weights = field(default_factory=dict)
    shifts: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Sparsifier:
    """A complete method: three pure functions over State.

    needs(state) -> the signals that an update wants now, or None when nothing is due;
    init(sites, weights, seed) -> State; update(state, sites, weights, signals) -> Update.
    name: what reports show. target: the sparsity it ends with, over all its sites (None: whatever
    comes out). last: the step of its last update (None: it never ends).
    observes: whether it learns from every training step, and knows nothing where nothing trains.
    whole: whether it may remove whole outputs of a layer, or whole layers.
    """

    name: str
    needs: Callable[[State], frozenset[str] | None]
    init: Callable[[Sequence[Site], Weights, int], State]
    update: Callable[[State, Sequence[Site], Weights, Signals], Update]
    target: float | None = None
    last: int | None = None
    observes: bool = False
    whole: bool = False

    def __repr__(self) -> str:
        """Show the method and its arguments."""
        return self.name


# --- the slots that methods are composed of ---------------------------------------------------


@dataclass(frozen=True)
class Context:
    """What a slot may look at beside the weight of one site.

    mask: what is kept now (None = all of it); key: see `rng`, unique to seed, step, round and site;
    memory: what is remembered of this site, kind -> tensor.
    """

    site: Site
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    key: tuple[int | str, ...] = ()
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, kind: str) -> Tensor:
        """Return a signal of this site; raise SignalError if nobody provided it."""
        try:
            return self.signals[kind]
        except KeyError:
            raise SignalError(
                f"site {self.site.name!r} has no signal {kind!r}; "
                f"list it in the `needs` of the score that reads it"
            ) from None


@dataclass(frozen=True)
class Score:
    """Which? `value(w, context)` -> float tensor shaped like w; higher = keep.

    cheap: computing it again costs less than keeping it, so that thresholds stream over sites.
    observe(w, context) -> what to remember of the site, kind -> tensor, at every step up to
    the last update; `value` and the next `observe` find it in `context.memory`. watches: the
    signals that `observe` reads.
    """

    name: str
    value: Callable[[Tensor, Context], Tensor]
    needs: frozenset[str] = frozenset()
    cheap: bool = False
    observe: Callable[[Tensor, Context], Mapping[str, Tensor]] | None = None
    watches: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Structure:
    """In which shape? Every structure is: reduce to rows of units, keep k of each row, expand.

    layout(shape) -> (rows, units per row, elements per unit), or ShapeError;
    reduce(score) -> [rows, units]; expand(keep [rows, units], shape) -> bool tensor of that shape.
    pinned: the sparsity that the structure itself fixes, None if it fixes none. outputs: how many
    consecutive outputs have units of their own, so that a weight can be reduced and expanded piece
    by piece, units in the same order; 0 where only the whole weight can. whole: whether a unit is
    all that an output is made of: a filter, a neuron, a head, a layer.
    """

    name: str
    layout: Callable[[tuple[int, ...]], tuple[int, int, int]]
    reduce: Callable[[Tensor], Tensor]
    expand: Callable[[Tensor, tuple[int, ...]], Tensor]
    pinned: float | None = None
    outputs: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Allocation:
    """How much where? `share(sites, scores, sparsity)` -> {site name: sparsity}.

    The shares remove `sparsity` of all elements of the sites, or TargetError says who stands in
    the way. compares: whether it reads the scores (then they must be comparable between sites).
    least(sites): the lowest final sparsity that it can share out; below it, on the way of a ramp,
    it may give sites less than they end with. measure: what `sparsity` is a fraction of; unless it
    is "weights", how many weights are removed comes out of the shares. total(sites): how much of
    the measure the dense sites have (None: it has no total).
    """

    name: str
    share: Callable[[Sequence[Site], Scores, float], Mapping[str, float]]
    compares: bool = False
    least: Callable[[Sequence[Site]], float] = lambda sites: 0.0
    measure: str = "weights"
    total: Callable[[Sequence[Site]], float] | None = lambda sites: sum(s.size for s in sites)


@dataclass(frozen=True)
class Schedule:
    """How much when? `at(step)` -> sparsity to reach now, or None when no update is due.

    final: the sparsity it ends with; last: the step of its last update (None: never ends);
    gradual: whether it passes through other sparsities on the way; falls: whether it asks for less
    again, so that what is off has to return. adapt(reached, loss, best) -> the sparsity to go to at
    an update, from the one reached, the validation loss and the lowest so far; None = at(step).
    measure: what its numbers are a fraction of; None: of whatever the allocation counts.
    """

    name: str
    at: Callable[[int], float | None]
    final: float
    last: int | None = None
    gradual: bool = False
    falls: bool = False
    adapt: Callable[[float, float, float], float] | None = None
    measure: str | None = None


@dataclass(frozen=True)
class Growth:
    """What to add? `value(w, context)` ranks what is off; `turnover(step)` says how much is moved.

    turnover: fraction of a site's kept units that is dropped and grown again in one update.
    fill(w, context) -> values of grown weights; None = zeros.
    share(w, context) -> a site's share, in any unit, of what all sites drop together; None = every
    site grows as much as it dropped.
    """

    name: str
    value: Callable[[Tensor, Context], Tensor]
    turnover: Callable[[int], float]
    needs: frozenset[str] = frozenset()
    fill: Callable[[Tensor, Context], Tensor] | None = None
    share: Callable[[Tensor, Context], float] | None = None


@dataclass(frozen=True)
class Solver:
    """Repair? `solve(w, scores [rows, units], k, structure, context)` -> (mask, new w or None).

    Keeps exactly k units of each row. None: the weights that stay are left as they are. w has its
    outputs on axis 0. shift(w, what becomes of it, context) -> what the layer's bias gains,
    [outputs]; None: biases stay.
    """

    name: str
    solve: Callable[[Tensor, Tensor, int, Structure, Context], tuple[Tensor, Tensor | None]]
    needs: frozenset[str] = frozenset()
    shift: Callable[[Tensor, Tensor, Context], Tensor] | None = None

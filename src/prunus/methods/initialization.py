"""Methods that prune before the training: run them with pr.prune, then attach pr.methods.fixed."""

from __future__ import annotations

from prunus import allocations, schedules, scores, structures
from prunus.compose import compose
from prunus.core import Allocation, Sparsifier, Structure
from prunus.methods.origin import at_initialisation


@at_initialisation
def iterative_snip(
    sparsity: float,
    *,
    rounds: int = 60,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Prune at initialisation by |dL/dw * w| of the network masked so far, in exponential rounds.

    Round k keeps (1 - s)^(k / rounds); what is off stays off. Every round takes a fresh gradient:
    pr.prune with batches= and loss=. Defaults: 60 rounds, element, global_.
    Source: de Jorge, Sanyal, Behl, Torr, Rogez, Dokania 2021, arXiv 2006.09081 (iterative SNIP).
    """
    return compose(
        scores.snip(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.one_shot(sparsity),
        rounds=rounds,
        name=f"iterative_snip({sparsity:g}, rounds={rounds})",
    )


@at_initialisation
def force(
    sparsity: float,
    *,
    rounds: int = 60,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Prune at initialisation by |dL/dw * w| in exponential rounds; what is off may return.

    The gradient is that of the masked network, w the initial weight also of what is off, which
    returns with it. Every round takes a fresh gradient: pr.prune with batches= and loss=.
    Defaults: 60 rounds, element, global_.
    Source: de Jorge, Sanyal, Behl, Torr, Rogez, Dokania 2021, arXiv 2006.09081 (FORCE).
    """
    return compose(
        scores.force(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.one_shot(sparsity),
        rounds=rounds,
        revive=True,
        remember=True,
        name=f"force({sparsity:g}, rounds={rounds})",
    )


@at_initialisation
def grasp(
    sparsity: float,
    *,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Prune at initialisation what lets the gradient flow least: keep top-k of w * (H g).

    Needs pr.prune with batches= and loss=; the paper takes ten examples of each class and divides
    the logits by 200. Defaults: element, global_. Source: Wang, Zhang, Grosse 2020,
    arXiv 2002.07376.
    """
    return compose(
        scores.grasp(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.one_shot(sparsity),
        name=f"grasp({sparsity:g})",
    )


@at_initialisation
def expander(sparsity: float, *, seed: int = 0, allocation: Allocation | None = None) -> Sparsifier:
    """Fix a random graph in which every output keeps as many inputs, whatever the weights are.

    Defaults: fan_in, uniform. Source: Prabhu, Varma, Namboodiri 2018, arXiv 1711.08757.
    """
    return compose(
        scores.expander(seed),
        structure=structures.fan_in(),
        allocation=allocation,
        schedule=schedules.one_shot(sparsity),
        name=f"expander({sparsity:g}, seed={seed})",
    )

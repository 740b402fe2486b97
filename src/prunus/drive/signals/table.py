"""The table of signals: a new one is a function (sources -> {site: tensor}) and a row here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prunus.core import (
    COACTIVATION,
    FLOW,
    GRADIENT,
    GRADIENT_SQUARE,
    GRADIENTS,
    GRAM,
    HESSIAN,
    HESSIAN_DIAGONAL,
    HUTCHINSON,
    INPUT_SQUARE,
    VALIDATION_LOSS,
    Signals,
)
from prunus.drive.signals.fisher import gradient_square, gradients
from prunus.drive.signals.flow import flow
from prunus.drive.signals.gradient import gradient
from prunus.drive.signals.hebb import coactivation
from prunus.drive.signals.hessian import hessian, hessian_diagonal, hutchinson
from prunus.drive.signals.inputs import gram, input_square
from prunus.drive.signals.sources import Sources, validation_loss
from prunus.errors import SignalError

COLLECTORS: dict[str, Callable[[Sources], dict[str, Tensor]]] = {
    GRADIENT: gradient,
    FLOW: flow,
    INPUT_SQUARE: input_square,
    GRAM: gram,
    GRADIENT_SQUARE: gradient_square,
    GRADIENTS: gradients,
    HESSIAN: hessian,
    HESSIAN_DIAGONAL: hessian_diagonal,
    HUTCHINSON: hutchinson,
    COACTIVATION: coactivation,
}


def collect(needs: frozenset[str], sources: Sources) -> Signals:
    """Return the signals in `needs`. Raises SignalError if one cannot be had, with the remedy."""
    unknown = needs - COLLECTORS.keys() - {VALIDATION_LOSS}
    if unknown:
        raise SignalError(
            f"no collector for {', '.join(sorted(unknown))}; known: {', '.join(COLLECTORS)}"
        )
    loss = validation_loss(sources) if VALIDATION_LOSS in needs else None
    kinds = sorted(needs - {VALIDATION_LOSS})
    return Signals({kind: COLLECTORS[kind](sources) for kind in kinds}, loss)

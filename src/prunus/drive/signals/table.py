"""The table of signals: a new one is a function (sources -> {site: tensor}) and a row here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prunus.core import FLOW, GRADIENT, Signals
from prunus.drive.signals.flow import flow
from prunus.drive.signals.gradient import gradient
from prunus.drive.signals.sources import Sources
from prunus.errors import SignalError

COLLECTORS: dict[str, Callable[[Sources], dict[str, Tensor]]] = {
    GRADIENT: gradient,
    FLOW: flow,
}


def collect(needs: frozenset[str], sources: Sources) -> Signals:
    """Return the signals in `needs`. Raises SignalError if one cannot be had, with the remedy."""
    unknown = needs - COLLECTORS.keys()
    if unknown:
        raise SignalError(
            f"no collector for {', '.join(sorted(unknown))}; known: {', '.join(COLLECTORS)}"
        )
    return Signals({kind: COLLECTORS[kind](sources) for kind in sorted(needs)})

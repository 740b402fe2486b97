"""The table of signals: a new one is a function (sources -> {site: tensor}) and a row here."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prunus.core import Signals
from prunus.drive.signals.factors import output_gram
from prunus.drive.signals.fisher import gradient_square, gradients
from prunus.drive.signals.flow import flow
from prunus.drive.signals.gates import gate, importance, output_sensitivity, output_taylor
from prunus.drive.signals.gradient import gradient
from prunus.drive.signals.hebb import coactivation
from prunus.drive.signals.hessian import hessian, hessian_diagonal, hutchinson
from prunus.drive.signals.hessian_gradient import hessian_gradient
from prunus.drive.signals.inputs import bias, gram, input_mean, input_rows, input_square
from prunus.drive.signals.norms import norm_scale
from prunus.drive.signals.outputs import (
    output_distinctness,
    output_magnitude,
    output_variance,
    output_zeros,
)
from prunus.drive.signals.sources import Sources, validation_loss
from prunus.errors import SignalError
from prunus.kinds import (
    BIAS,
    COACTIVATION,
    FLOW,
    GATE,
    GRADIENT,
    GRADIENT_SQUARE,
    GRADIENTS,
    GRAM,
    HESSIAN,
    HESSIAN_DIAGONAL,
    HESSIAN_GRADIENT,
    HUTCHINSON,
    IMPORTANCE,
    INPUT_MEAN,
    INPUT_ROWS,
    INPUT_SQUARE,
    NORM_SCALE,
    OUTPUT_DISTINCTNESS,
    OUTPUT_GRAM,
    OUTPUT_MAGNITUDE,
    OUTPUT_SENSITIVITY,
    OUTPUT_TAYLOR,
    OUTPUT_VARIANCE,
    OUTPUT_ZEROS,
    VALIDATION_LOSS,
)

COLLECTORS: dict[str, Callable[[Sources], dict[str, Tensor]]] = {
    GRADIENT: gradient,
    FLOW: flow,
    BIAS: bias,
    INPUT_SQUARE: input_square,
    INPUT_MEAN: input_mean,
    INPUT_ROWS: input_rows,
    GRAM: gram,
    OUTPUT_GRAM: output_gram,
    GRADIENT_SQUARE: gradient_square,
    GRADIENTS: gradients,
    HESSIAN: hessian,
    HESSIAN_DIAGONAL: hessian_diagonal,
    HUTCHINSON: hutchinson,
    COACTIVATION: coactivation,
    HESSIAN_GRADIENT: hessian_gradient,
    NORM_SCALE: norm_scale,
    OUTPUT_ZEROS: output_zeros,
    OUTPUT_MAGNITUDE: output_magnitude,
    OUTPUT_VARIANCE: output_variance,
    OUTPUT_DISTINCTNESS: output_distinctness,
    OUTPUT_SENSITIVITY: output_sensitivity,
    OUTPUT_TAYLOR: output_taylor,
    GATE: gate,
    IMPORTANCE: importance,
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

"""Parameter efficiency: what accuracy a network buys with the parameters it stores."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunus.errors import ValueRangeError

Outside = Literal["raise", "none"]


def accuracy_density(accuracy: float, parameters: float) -> float:
    """Top-1 accuracy in percent divided by parameters in millions.

    accuracy: fraction 0..1. parameters: stored and non-zero ones, with or without index.
    Rewards small, weak networks: each further percent costs disproportionately many parameters.
    Source: Bianco, Cadene, Celona, Napoletano, 2018, arXiv 1810.00736.
    """
    _check_accuracy(accuracy)
    _check_parameters(parameters)
    return (100.0 * accuracy) / (parameters / 1e6)


def correct_per_logit_and_parameter(correct: int, classes: int, parameters: float) -> float:
    """N_correct / (classes * parameters), correct counted on the evaluation set.

    Source: after Hoefler et al., 2021, arXiv 2102.00554; this library's reading.
    """
    if correct < 0:
        raise ValueRangeError(f"correct is {correct}; it must not be negative")
    if classes < 1:
        raise ValueRangeError(f"classes is {classes}; it must be at least 1")
    _check_parameters(parameters)
    return correct / (classes * parameters)


def hardness(accuracy: float) -> float:
    """h(a) = -ln(1 - a): each halving of the error adds ln 2; infinite at a = 1.

    This library's reading of the survey's hardness, not its definition; replace it at will.
    """
    _check_accuracy(accuracy)
    return math.inf if accuracy == 1.0 else -math.log1p(-accuracy)


@dataclass(frozen=True, init=False)
class Frontier:
    """Measured dense networks of one task: (parameters, accuracy), only the non-dominated ones.

    A point is dominated if another has no more parameters and no less accuracy, and differs.
    The frontier as a measure of difficulty is this library's reading of the survey.
    """

    points: tuple[tuple[float, float], ...]

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        """Keep the non-dominated points in order; raises ValueRangeError without any point."""
        measured = sorted({(float(p), float(a)) for p, a in points}, key=lambda x: (x[0], -x[1]))
        kept: list[tuple[float, float]] = []
        for parameters, accuracy in measured:
            _check_parameters(parameters)
            _check_accuracy(accuracy)
            if not kept or accuracy > kept[-1][1]:
                kept.append((parameters, accuracy))
        if not kept:
            raise ValueRangeError("Frontier: no points; measure at least one dense network")
        object.__setattr__(self, "points", tuple(kept))

    def reference(self, accuracy: float, *, outside: Outside = "raise") -> float | None:
        """P_ref(a): parameters of the best dense network of that accuracy.

        Between measured points log P is linear in a. Outside the measured accuracies it raises
        ValueRangeError, or returns None with outside="none"; it never extrapolates.
        """
        _check_accuracy(accuracy)
        if outside not in ("raise", "none"):
            raise ValueRangeError(f"outside is {outside!r}; allowed: 'raise', 'none'")
        accuracies = [a for _, a in self.points]
        if not accuracies[0] <= accuracy <= accuracies[-1]:
            if outside == "none":
                return None
            raise ValueRangeError(
                f"accuracy {accuracy:.4f} is outside the measured dense networks "
                f"({accuracies[0]:.4f} to {accuracies[-1]:.4f}); measure a dense network there, "
                "or pass outside='none'"
            )
        right = bisect_left(accuracies, accuracy)
        if accuracies[right] == accuracy:
            return self.points[right][0]
        (p0, a0), (p1, a1) = self.points[right - 1], self.points[right]
        weight = (accuracy - a0) / (a1 - a0)
        return math.exp((1 - weight) * math.log(p0) + weight * math.log(p1))


def parameter_efficiency(
    accuracy: float, parameters: float, frontier: Frontier, *, outside: Outside = "raise"
) -> float | None:
    """P_ref(accuracy) / parameters: 1 on the dense frontier, larger is better, no unit.

    The frontier is this library's reading of the survey's hardness (arXiv 2102.00554).
    Outside the measured accuracies: see Frontier.reference.
    """
    _check_parameters(parameters)
    reference = frontier.reference(accuracy, outside=outside)
    return None if reference is None else reference / parameters


def parameter_slack(
    accuracy: float, parameters: float, frontier: Frontier, *, outside: Outside = "raise"
) -> float | None:
    """log2(parameters / P_ref(accuracy)), in doublings: halvings left to the dense frontier.

    Negative: better than any dense network measured. The frontier is this library's reading of
    the survey's hardness (arXiv 2102.00554). Outside the measured accuracies: Frontier.reference.
    """
    efficiency = parameter_efficiency(accuracy, parameters, frontier, outside=outside)
    return None if efficiency is None else -math.log2(efficiency)


def with_index(nonzeros: int, index_bits: float, value_bits: float) -> float:
    """Parameters including the cost of saying where they are: nonzeros + index_bits / value_bits.

    index_bits: all index bits of the stored network. value_bits: bits of one stored value.
    """
    if nonzeros < 0 or index_bits < 0:
        raise ValueRangeError(f"nonzeros {nonzeros} and index_bits {index_bits} must be >= 0")
    if value_bits <= 0:
        raise ValueRangeError(f"value_bits is {value_bits}; it must be positive")
    return nonzeros + index_bits / value_bits


def _check_accuracy(accuracy: float) -> None:
    if not 0.0 <= accuracy <= 1.0:
        raise ValueRangeError(f"accuracy is {accuracy}; it is a fraction from 0 to 1, not percent")


def _check_parameters(parameters: float) -> None:
    if not 0 < parameters < math.inf:
        raise ValueRangeError(f"parameters is {parameters}; it must be positive and finite")

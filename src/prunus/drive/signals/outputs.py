"""What comes out of each weight's layer, after the norm and activation that follow it directly.

One mechanism: torch's own function mode sees every call, so that modules and functional calls are
followed alike. Values per output are returned in the weight's shape, as views that repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunus.core import Site
from prunus.drive.signals.sources import Sources, call, untouched
from prunus.errors import NotFiniteError, SignalError, ValueRangeError
from prunus.scores.pairs import nearest_first
from prunus.sites import evaluating

_PRODUCTS = {
    "linear": 0, "addmm": 0, "matmul": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3,
    "conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3,
}  # fmt: skip
"""Function that multiplies with a weight -> spatial axes that follow its channels."""

_FOLLOWED = {
    "batch_norm", "instance_norm", "group_norm", "layer_norm", "dropout", "relu", "relu_",
    "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "gelu", "silu",
    "mish", "hardswish", "hardsigmoid", "hardtanh", "hardtanh_", "softplus", "tanh", "tanh_",
    "sigmoid", "sigmoid_", "prelu", "rrelu",
}  # fmt: skip
"""Functions that turn every unit of an output into the same unit after norm and activation."""


@dataclass
class Output:
    """An output of a site's layer: values, and the axis of its units."""

    site: str
    values: Tensor
    axis: int

    def units(self, tensor: Tensor) -> Tensor:
        """Return a tensor like `values` as [units, examples and positions]."""
        return tensor.movedim(self.axis, 0).reshape(tensor.shape[self.axis], -1)

    def examples(self, tensor: Tensor) -> Tensor:
        """Return a tensor like `values` as [examples, units, positions]."""
        moved = tensor.movedim(self.axis, 1)
        return moved.reshape(moved.shape[0], moved.shape[1], -1)


class Following(TorchFunctionMode):
    """Collects the outputs of the given weights while it is entered."""

    def __init__(self, weights: Mapping[int, str], differentiable: bool) -> None:
        """weights: id of a tensor that is multiplied with -> site; differentiable: of outputs."""
        super().__init__()
        self.outputs: list[Output] = []
        self._weights, self._differentiable = weights, differentiable
        self._owner: dict[int, Output] = {}
        self._held: list[Tensor] = []  # an id means nothing once its tensor is gone

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function and note whose output it made."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor):
            return result
        if name in _PRODUCTS:
            given = [*args, *(kwargs or {}).values()]
            site = next((self._weights[id(a)] for a in given if id(a) in self._weights), None)
            if site is not None:
                if self._differentiable and not result.requires_grad:
                    result = result.requires_grad_() + 0  # no leaf: the activation may be in place
                self._note(Output(site, result, result.ndim - 1 - _PRODUCTS[name]), result)
                self.outputs.append(self._owner[id(result)])
        elif name in _FOLLOWED and args and id(args[0]) in self._owner:
            output = self._owner[id(args[0])]
            if output.values is args[0] and result.shape == args[0].shape:
                output.values = result
                self._note(output, result)
        return result

    def _note(self, output: Output, tensor: Tensor) -> None:
        self._owner[id(tensor)] = output
        self._held.append(tensor)


def outputs_of(
    sources: Sources, *, differentiable: bool = False, loss: bool = False
) -> Iterator[tuple[list[Output], Tensor]]:
    """Yield (outputs of the sites, the loss or the network's output) of every calibration batch.

    In eval mode, with buffers and random state untouched. loss: whether a loss is needed; without
    one the network's first output tensor is yielded. Raises SignalError without data.
    """
    batches = sources.batches
    if batches is None and sources.inputs is not None and not loss:
        batches = [sources.inputs]
    if batches is None or (loss and sources.loss is None):
        needed = "batches= and loss=, where loss(model, batch) returns a scalar" if loss else (
            "batches=, calibration data, or inputs=, one example batch"
        )  # fmt: skip
        raise SignalError(f"this method looks at the outputs of layers: pass {needed}")
    weights = {id(parameter): name for name, parameter in sources.parameters.items()}
    found: list[Tensor] = []
    handle = sources.model.register_forward_hook(lambda m, a, out: found.append(_first(out)))
    seen: set[str] = set()
    try:
        with untouched(sources.model), evaluating(sources.model):
            for batch in batches:
                found.clear()
                with (
                    torch.set_grad_enabled(differentiable),
                    Following(weights, differentiable) as f,
                ):
                    if sources.loss is not None:
                        value = sources.loss(sources.model, batch)
                    else:
                        value = call(sources.model, batch)
                _expect_numbers(f.outputs)
                seen |= {output.site for output in f.outputs}
                yield f.outputs, value if loss else found[-1]
    finally:
        handle.remove()
    if not found and not seen:
        raise ValueRangeError("the calibration data is empty: batches= gave no batch")
    unseen = [site.name for site in sources.sites if site.name not in seen]
    if unseen:
        raise SignalError(
            f"the outputs of {', '.join(unseen)} cannot be seen: they are known for linear and "
            f"convolution layers that the batches reach, not inside nn.MultiheadAttention, nn.LSTM "
            f"and nn.GRU; exclude these sites"
        )


def _expect_numbers(outputs: Sequence[Output]) -> None:
    """Refuse NaN where it is seen: comparisons and the gradient of a ReLU would hide it."""
    for output in outputs:
        if output.values.isnan().any():
            raise NotFiniteError(
                f"the outputs of {output.site!r} hold NaN on the calibration data: its weights or "
                f"the data are not finite; repair them, nothing was changed"
            )


def _first(value: Any) -> Tensor:
    while not isinstance(value, Tensor):
        values = list(value.values()) if isinstance(value, Mapping) else list(value)
        value = values[0]
    return value


def spread(sites: Sequence[Site], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeat a value per output over each weight, as a view of the weight's shape."""
    found = {}
    for site in sites:
        axis = 1 if site.transposed else 0
        value = values[site.name]
        if value.numel() != site.shape[axis]:
            raise SignalError(
                f"site {site.name!r} (shape {site.shape}) has {value.numel()} outputs, not one per "
                f"slice of axis {axis} (a grouped transposed convolution?); exclude it"
            )
        narrow = [1] * len(site.shape)
        narrow[axis] = site.shape[axis]
        found[site.name] = value.reshape(narrow).expand(site.shape)
    return found


def averaged(sources: Sources, measure: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the mean of `measure` over examples and positions, per output, in float64."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for outputs, _ in outputs_of(sources):
        for output in outputs:
            values = measure(output.units(output.values)).double()
            total = values.sum(1)
            name = output.site
            totals[name] = totals[name] + total if name in totals else total
            counts[name] = counts.get(name, 0) + values.shape[1]
    return spread(sources.sites, {n: total / max(1, counts[n]) for n, total in totals.items()})


def output_zeros(sources: Sources) -> dict[str, Tensor]:
    """Return the fraction of zeros of each output after its activation."""
    return averaged(sources, lambda a: a == 0)


def output_magnitude(sources: Sources) -> dict[str, Tensor]:
    """Return E|a| of each output after its activation."""
    return averaged(sources, lambda a: a.abs())


def output_variance(sources: Sources) -> dict[str, Tensor]:
    """Return the variance of each output after its activation, over examples and positions."""
    grams = _centred(sources, lambda a: a.square().sum(1))
    return spread(sources.sites, {name: total / count for name, (total, count) in grams.items()})


def output_distinctness(sources: Sources) -> dict[str, Tensor]:
    """Return 1 - max |correlation| of each output with those that are removed after it.

    Of the two most correlated outputs that are left, the one with the smaller variance is removed
    next; the order is complete, and the values rise along it. An output that never changes is
    fully redundant.
    """
    grams = _centred(sources, lambda a: a @ a.t())
    found = {}
    for name, (total, count) in grams.items():
        variance = (total / count).diagonal().clamp(min=0)
        norm = (variance.unsqueeze(0) * variance.unsqueeze(1)).sqrt()
        alike = torch.where(norm > 0, (total / count).abs() / norm.clamp(min=1e-300), 1.0)
        values = nearest_first(1.0 - alike.clamp(max=1.0), variance)
        found[name] = values.clamp(max=1.0)
    return spread(sources.sites, found)


def _centred(
    sources: Sources, product: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, int]]:
    """Return sums of products of values minus a shift, corrected to their mean, and the counts."""
    sums: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}
    for outputs, _ in outputs_of(sources):
        for output in outputs:
            values = output.units(output.values).double()
            # a mean of the first batch as shift keeps the difference of squares exact enough
            shift = sums[output.site][0] if output.site in sums else values.mean(1, keepdim=True)
            values = values - shift
            total, products = values.sum(1, keepdim=True), product(values)
            count = values.shape[1]
            if output.site in sums:
                _, old, before, seen = sums[output.site]
                total, products, count = total + old, products + before, count + seen
            sums[output.site] = (shift, total, products, count)
    found = {}
    for name, (_, total, products, count) in sums.items():
        # the mean that is left over after the shift counts `count` times
        found[name] = (products - product(total) / max(1, count), max(1, count))
    return found

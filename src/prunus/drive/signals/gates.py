"""Derivatives by the outputs of each weight's layer, after the norm and activation that follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from prunus.drive.signals.flow import ones_of, positive_network, total_of
from prunus.drive.signals.linear import norms_as_scale
from prunus.drive.signals.outputs import Following, Output, outputs_of, spread
from prunus.drive.signals.sources import Sources, as_call, widened
from prunus.errors import SignalError
from prunus.sites import evaluating


def gate(sources: Sources) -> dict[str, Tensor]:
    """Return dL/d(alpha) of a gate alpha = 1 on each output: sum of dL/da a, mean over batches."""
    totals: dict[str, Tensor] = {}
    count = 0
    for outputs, loss in outputs_of(sources, differentiable=True, loss=True):
        for output, grad in _gradients(outputs, loss):
            value = output.units(_wide_product(grad, output.values)).sum(1)
            totals[output.site] = totals.get(output.site, 0.0) + value
        count += 1
    return spread(sources.sites, {name: value / count for name, value in totals.items()})


def output_taylor(sources: Sources) -> dict[str, Tensor]:
    """Return mean over examples of |mean over positions of dL/da a| of each output.

    The loss is taken as the mean over the examples of a batch, so that the gradient of an example
    is the batch size times as large.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for outputs, loss in outputs_of(sources, differentiable=True, loss=True):
        for output, grad in _gradients(outputs, loss):
            parts = output.examples(_wide_product(grad, output.values)) * len(grad)
            name, value = output.site, parts.mean(2).abs().sum(0)
            totals[name] = totals.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + len(parts)
    return spread(sources.sites, {name: total / counts[name] for name, total in totals.items()})


def output_sensitivity(sources: Sources) -> dict[str, Tensor]:
    """Return max over the network's outputs o_k of the root mean square of do_k/da, per output.

    Mean over examples, squares summed over positions; one backward pass per o_k and batch.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for outputs, result in outputs_of(sources, differentiable=True):
        columns = result.reshape(result.shape[0], -1)
        for output in outputs:
            counts[output.site] = counts.get(output.site, 0) + columns.shape[0]
        for k in range(columns.shape[1]):
            for output, grad in _gradients(outputs, columns[:, k].sum(), keep=True):
                square = output.units(grad.double().square()).sum(1)
                if output.site not in totals:
                    totals[output.site] = square.new_zeros(columns.shape[1], len(square))
                totals[output.site][k] += square
    found = {name: (t / counts[name]).sqrt().amax(0) for name, t in totals.items()}
    return spread(sources.sites, found)


def importance(sources: Sources) -> dict[str, Tensor]:
    """Return the importance propagated to each output: |W_(l+1)|^T ... |W_L|^T 1, no data.

    Through the masked network of absolute weights (see `flow`), as its derivative by the output,
    summed over positions; activations count as linear, pooling and batch norms as they act on
    it, other norms as their scale (`linear.norms_as_scale`).
    """
    if sources.inputs is None:
        raise SignalError(
            "importance propagation runs the network on ones of the input's shape: pass inputs=, "
            "one example batch (its values are not used)"
        )
    state, leaves = positive_network(sources)
    weights = {id(leaf): name for name, leaf in leaves.items()}
    with evaluating(sources.model), norms_as_scale(sources.model), torch.enable_grad():
        args, kwargs = as_call(ones_of(sources.inputs))
        with Following(weights, differentiable=True) as following:
            result = functional_call(sources.model, state, args, kwargs, tie_weights=False)
        total = total_of(result)
    found: dict[str, Tensor] = {}
    for output, grad in _gradients(following.outputs, total):
        found[output.site] = found.get(output.site, 0.0) + output.units(grad).sum(1)
    missing = [site.name for site in sources.sites if site.name not in found]
    if missing:
        raise SignalError(f"the outputs of {', '.join(missing)} cannot be seen; exclude them")
    return spread(sources.sites, found)


def _wide_product(grad: Tensor, values: Tensor) -> Tensor:
    """Return grad * values in float64; a product of two small halves would underflow."""
    return (widened(grad) * widened(values.detach())).double()


def _gradients(
    outputs: list[Output], scalar: Tensor, keep: bool = False
) -> list[tuple[Output, Tensor]]:
    grads = torch.autograd.grad(
        scalar, [output.values for output in outputs], retain_graph=keep, allow_unused=True
    )
    return [
        (output, torch.zeros_like(output.values) if grad is None else grad)
        for output, grad in zip(outputs, grads, strict=True)
    ]

"""Synaptic flow: how much of the signal passes through each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from prunus.core import Masks
from prunus.drive.signals.linear import norms_as_scale
from prunus.drive.signals.sources import Sources, as_call
from prunus.errors import SignalError
from prunus.sites import evaluating

_NOTHING = 1e-12
"""Share of the whole flow below which a layer carries none."""


def flow(sources: Sources) -> dict[str, Tensor]:
    """Derivative of R = sum of outputs for an all-ones input, all weights |w|, biases 0, in eval.

    Batch norms keep their scale and running variance but shift nothing; norms that take statistics
    of their input are their scale (`linear.norms_as_scale`). float64: the product of many layers
    leaves the range of float32. Raises SignalError for a dense site that nothing flows through.
    """
    if sources.inputs is None:
        raise SignalError(
            "synaptic flow runs the network on ones of the input's shape: pass inputs=, one "
            "example batch (its values are not used)"
        )
    state, leaves = positive_network(sources)
    model = sources.model
    with evaluating(model), norms_as_scale(model), torch.enable_grad():
        args, kwargs = as_call(ones_of(sources.inputs))
        total = total_of(functional_call(model, state, args, kwargs, tie_weights=False))
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    _expect_flow(found, leaves, sources.masks, float(total.detach()))
    return found


def _expect_flow(
    found: Mapping[str, Tensor], leaves: Mapping[str, Tensor], masks: Masks, total: float
) -> None:
    """Refuse a dense site without flow: all of it would go, for no reason of its own."""
    dry = [
        name
        for name, grad in found.items()
        if name not in masks
        and leaves[name].detach().any()
        and float((grad * leaves[name].detach()).sum()) <= _NOTHING * abs(total)
    ]
    if dry:
        raise SignalError(
            f"no synaptic flow passes through {', '.join(dry)}, so all of it would be removed: a "
            f"softmax lets none through to queries and keys, a layer of zeros none to those before "
            f"it, and what the outputs do not depend on has none; exclude these sites"
        )


def positive_network(sources: Sources) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all parameters and buffers in absolute value, biases 0, and the leaves of the sites.

    Attention masks (float buffers with nothing above 0, or infinite) stay as they are, running
    means become 0. In float64 and masked; for `torch.func.functional_call` without tying.
    """
    model, state = sources.model, {}
    where = {id(parameter): name for name, parameter in sources.parameters.items()}
    leaves: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = parameter.detach().double().abs()
        if parameter.ndim < 2 and "bias" in name.rpartition(".")[2]:
            value = torch.zeros_like(value)
        site = where.get(id(parameter))
        if site is not None:
            if site not in leaves:
                mask = sources.masks.get(site)
                leaves[site] = (value if mask is None else value * mask).requires_grad_()
            value = leaves[site]
        state[name] = value
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            value = buffer.detach().double()
            if name.endswith("running_mean"):
                value = torch.zeros_like(value)
            masks = bool((value <= 0).all()) or not bool(value.isfinite().all())
            state[name] = value if masks else value.abs()
    return state, leaves


def ones_of(inputs: Any) -> Any:
    """Replace float tensors by one example of ones; integer tensors stay as they are."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            return inputs[:1]
        return torch.ones_like(inputs[:1], dtype=torch.float64)
    if isinstance(inputs, Mapping):
        return {key: ones_of(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(ones_of(value) for value in inputs)
    return inputs


def total_of(outputs: Any) -> Tensor:
    """Return the sum of all output tensors."""
    if isinstance(outputs, Tensor):
        return outputs.sum()
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    totals = [total_of(v) for v in values if isinstance(v, (Tensor, Mapping, tuple, list))]
    return torch.stack(totals).sum()

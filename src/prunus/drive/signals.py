"""Collect the signals that a sparsifier asks for. A new signal is a function and a row below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunus.core import FLOW, GRADIENT, Masks, Signals, Site
from prunus.errors import SignalError, ValueRangeError
from prunus.sites import evaluating

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""


@dataclass(frozen=True)
class Sources:
    """What signals can be computed from.

    model: unwrapped; parameters: of the sites; masks: now; inputs: one example batch (tensor, tuple
    or dict); batches and loss: for gradients outside of a training loop; training: whether the
    gradients that a training step left in `.grad` may be read.
    """

    model: nn.Module
    sites: Sequence[Site]
    parameters: Mapping[str, nn.Parameter]
    masks: Masks
    inputs: Any = None
    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    training: bool = False


def collect(needs: frozenset[str], sources: Sources) -> Signals:
    """Return the signals in `needs`. Raises SignalError if one cannot be had, with the remedy."""
    unknown = needs - _COLLECTORS.keys()
    if unknown:
        raise SignalError(
            f"no collector for {', '.join(sorted(unknown))}; known: {', '.join(_COLLECTORS)}"
        )
    return Signals({kind: _COLLECTORS[kind](sources) for kind in sorted(needs)})


def _gradient(sources: Sources) -> dict[str, Tensor]:
    if sources.training:
        return {site.name: _grad_of(site, sources.parameters[site.name]) for site in sources.sites}
    if sources.batches is None or sources.loss is None:
        raise SignalError(
            "this method reads the gradient of the loss: pass batches= and loss=, where "
            "loss(model, batch) returns a scalar; or attach it to an optimizer"
        )
    for name, parameter in sources.parameters.items():
        if not parameter.requires_grad:
            raise SignalError(
                f"site {name!r} (shape {tuple(parameter.shape)}) is frozen, so it has no gradient; "
                f"exclude it, or set requires_grad on it"
            )
    total = {name: torch.zeros_like(p) for name, p in sources.parameters.items()}
    count = 0
    with torch.enable_grad(), untouched(sources.model):
        for batch in sources.batches:
            loss = sources.loss(sources.model, batch)
            grads = torch.autograd.grad(loss, list(sources.parameters.values()), allow_unused=True)
            for name, grad in zip(total, grads, strict=True):
                if grad is not None:
                    total[name] += grad
            count += 1
    if not count:
        raise ValueRangeError("the calibration data is empty: batches= gave no batch")
    return {name: value / count for name, value in total.items()}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give buffers (running statistics) and the global random state back as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _grad_of(site: Site, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise SignalError(
            f"site {site.name!r} (shape {site.shape}) has no gradient at this step; if the loss "
            f"does not reach it, exclude it; if zero_grad runs before step, call it after"
        )
    return parameter.grad.detach()


def _flow(sources: Sources) -> dict[str, Tensor]:
    """Derivative of R = sum of outputs for an all-ones input, all weights |w|, biases 0, in eval.

    Norm layers keep their scale and running variance but shift nothing. float64: the product of
    many layers leaves the range of float32.
    """
    if sources.inputs is None:
        raise SignalError(
            "synaptic flow runs the network on ones of the input's shape: pass inputs=, one "
            "example batch (its values are not used)"
        )
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
            state[name] = torch.zeros_like(buffer, dtype=torch.float64)
            if not name.endswith("running_mean"):
                state[name] = buffer.detach().double().abs()
    with evaluating(model), torch.enable_grad():
        inputs = _ones(sources.inputs)
        args, kwargs = as_call(inputs)
        flow = _total(functional_call(model, state, args, kwargs, tie_weights=False))
    grads = torch.autograd.grad(flow, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read example inputs as the arguments of a call: a tuple or list, a dict, or one value."""
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _ones(inputs: Any) -> Any:
    """Replace float tensors by one example of ones; integer tensors stay as they are."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            return inputs[:1]
        return torch.ones_like(inputs[:1], dtype=torch.float64)
    if isinstance(inputs, Mapping):
        return {key: _ones(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_ones(value) for value in inputs)
    return inputs


def _total(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.sum()
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    totals = [_total(v) for v in values if isinstance(v, (Tensor, Mapping, tuple, list))]
    return torch.stack(totals).sum()


_COLLECTORS: dict[str, Callable[[Sources], dict[str, Tensor]]] = {
    GRADIENT: _gradient,
    FLOW: _flow,
}

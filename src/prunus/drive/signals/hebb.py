"""How much the two ends of every weight are active together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.drive.signals.sources import Sources, as_call, untouched, wide_zeros
from prunus.errors import SignalError
from prunus.sites import evaluating


def coactivation(sources: Sources) -> dict[str, Tensor]:
    """Return mean over examples of y_i x_j per weight: inputs x, outputs y of the layer, in eval.

    It is the derivative by the weight of |y|^2 / 2 through this layer alone, so that one rule
    serves linear layers and convolutions (which sum over positions).
    """
    if sources.inputs is None and (sources.batches is None or sources.loss is None):
        raise SignalError(
            "co-activation runs the network: pass inputs=, one example batch; or batches= and loss="
        )
    totals = {name: wide_zeros(p) for name, p in sources.parameters.items()}
    examples = dict.fromkeys(totals, 0)

    def watch(name: str, parameter: nn.Parameter) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            y = output if isinstance(output, Tensor) else output[0]
            if not (isinstance(y, Tensor) and y.requires_grad):
                return
            (found,) = torch.autograd.grad(
                y, parameter, y.detach(), retain_graph=True, allow_unused=True
            )
            if found is not None:
                totals[name] += found
                examples[name] += y.shape[0]

        return hook

    handles = [
        sources.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(watch(name, p))
        for name, p in sources.parameters.items()
    ]
    try:
        with torch.enable_grad(), untouched(sources.model), evaluating(sources.model):
            _run(sources)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, count in examples.items() if not count]
    if silent:
        raise SignalError(
            f"sites {', '.join(silent)} were not used by a trainable layer on the example batch; "
            f"exclude them, or set requires_grad on them"
        )
    return {name: total / examples[name] for name, total in totals.items()}


def _run(sources: Sources) -> None:
    if sources.inputs is not None:
        args, kwargs = as_call(sources.inputs)
        sources.model(*args, **kwargs)
        return
    assert sources.batches is not None
    assert sources.loss is not None
    for batch in sources.batches:
        sources.loss(sources.model, batch)

"""What goes into each weight on calibration data: one hook, and two moments streamed through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core import Site
from prunus.drive.signals import products
from prunus.drive.signals.calls import Calls
from prunus.drive.signals.patches import Inputs, inputs_of, own_forward
from prunus.drive.signals.sources import Sources, call, untouched
from prunus.errors import SignalError, ValueRangeError
from prunus.sites import biases_of, evaluating

ROWS = 1 << 12
"""Rows of one float32 product; sums of products are float64."""

SAMPLE = 1 << 10
"""Rows of inputs that are kept as they are."""

See = Callable[[str, Inputs], None]
"""(site name, what goes into its weight in this call)."""


def input_square(sources: Sources) -> dict[str, Tensor]:
    """Return E[x_j^2] per column j of the weight's matrix, float64 [groups, columns].

    The mean runs over all rows: tokens, or output positions of a convolution.
    """
    return _means(sources, lambda x: x.square().sum(1))


def gram(sources: Sources) -> dict[str, Tensor]:
    """Return E[x x^T] of the inputs of each weight, float64 [groups, columns, columns]."""
    return _means(sources, products.gram)


def input_mean(sources: Sources) -> dict[str, Tensor]:
    """Return E[x_j] per column j of the weight's matrix, float64 [groups, columns]."""
    return _means(sources, lambda x: x.sum(1))


def input_rows(sources: Sources) -> dict[str, Tensor]:
    """Return a uniform sample of what each weight is multiplied with, [groups, rows, columns].

    At most SAMPLE rows, the same for the same data; all of them if there are no more.
    """
    chosen: dict[str, tuple[Tensor, Tensor]] = {}
    draws = {name: torch.Generator().manual_seed(0) for name in sources.parameters}

    def see(name: str, inputs: Inputs) -> None:
        for patches in inputs.patches():
            for rows in patches.split(ROWS, dim=1):
                keys = torch.rand(rows.shape[1], dtype=torch.float64, generator=draws[name])
                if name in chosen:
                    rows = torch.cat([chosen[name][0], rows], dim=1)
                    keys = torch.cat([chosen[name][1], keys])
                best = keys.argsort()[:SAMPLE].sort().values
                chosen[name] = rows[:, best].clone(), keys[best]

    with watching(sources.model, sources.sites, sources.parameters, see):
        run(sources)
    _expect_reached(sources, chosen.keys())
    return {site.name: chosen[site.name][0] for site in sources.sites}


def bias(sources: Sources) -> dict[str, Tensor]:
    """Return the bias of each site's layer, float64 [outputs]; zeros where there is none."""
    found = {}
    for site in sources.sites:
        given = biases_of(sources.model, sources.parameters[site.name])
        outputs = site.shape[1 if site.transposed else 0]
        zeros = torch.zeros(outputs, dtype=torch.float64)
        found[site.name] = given[0].detach().double() if given else zeros
    return found


def _means(sources: Sources, product: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(sources.parameters, 0)
    last: tuple[Inputs, Tensor] | None = None

    def see(name: str, inputs: Inputs) -> None:
        nonlocal last
        if last is None or not inputs.same(last[0]):  # q, k and v read one tensor: once is enough
            last = inputs, _total(inputs, product)
        if name in totals:
            totals[name] += last[1]
        else:
            totals[name] = last[1].clone()
        counts[name] += inputs.rows

    with watching(sources.model, sources.sites, sources.parameters, see):
        run(sources)
    _expect_reached(sources, {name for name, count in counts.items() if count})
    return {site.name: totals[site.name].div_(counts[site.name]) for site in sources.sites}


def _expect_reached(sources: Sources, seen: Set[str]) -> None:
    for site in sources.sites:
        if site.name not in seen:
            raise SignalError(
                f"no calibration batch ran the module of {site.name!r} (shape {site.shape}), so "
                f"nothing is known of its inputs; exclude it (nn.MultiheadAttention uses weights "
                f"without running their modules), or give batches that reach it"
            )


def _total(inputs: Inputs, product: Callable[[Tensor], Tensor]) -> Tensor:
    total: Tensor | None = None
    for patches in inputs.patches():
        wide = torch.promote_types(patches.dtype, torch.float32)
        for rows in patches.split(ROWS, dim=1):
            part = product(rows.to(wide)).double()
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


@contextmanager
def watching(
    model: nn.Module, sites: Any, parameters: dict[str, nn.Parameter] | Any, see: See
) -> Iterator[None]:
    """Call `see` with what goes into each site's weight, every time that its module runs.

    A tied weight is seen in every module that multiplies with it. Hooks are gone at the end.
    Raises SignalError for a site whose inputs cannot be seen, such as the weights of an nn.LSTM.
    """
    known: dict[int, Site] = {id(parameters[site.name]): site for site in sites}
    handles, watched, called = [], set(), {}
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            site = known.get(id(parameter))
            if site is None or inputs_of(module, own) is None:
                continue
            watched.add(site.name)
            if own_forward(module):
                called[id(parameter)] = site.name
                continue
            hook = _hook(own, site.name, see)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        for site in known.values():
            if site.name not in watched:
                raise SignalError(
                    f"the inputs of {site.name!r} (shape {site.shape}) cannot be seen: they are "
                    f"known for linear, bilinear and convolution layers and recurrent cells; "
                    f"exclude it, or take a method that reads no inputs"
                )
        with Calls(called, see) if called else nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(own: str, site: str, see: See) -> Callable[..., None]:
    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        reader = inputs_of(module, own)
        if reader is not None:
            with torch.no_grad():
                see(site, reader(module, (*args, *kwargs.values()), output))

    return after


def run(sources: Sources) -> None:
    """Run the model on all batches: in eval mode, without gradients, nothing of it touched.

    With a loss each batch is run as loss(model, batch), else as the arguments of a call.
    """
    batches = sources.batches
    if batches is None and sources.inputs is not None:
        batches = [sources.inputs]
    if batches is None:
        raise SignalError(
            "this method reads the inputs of layers: pass batches=, calibration data, each batch "
            "the arguments of a call (a tensor, tuple or dict), or also loss=, for other batches"
        )
    count = 0
    with (
        torch.no_grad(),
        untouched(sources.model),
        evaluating(sources.model),
        products.FastLinear(),
    ):
        for batch in batches:
            if sources.loss is not None:
                sources.loss(sources.model, batch)
            else:
                call(sources.model, batch)
            count += 1
    if not count:
        raise ValueRangeError("the calibration data is empty: batches= gave no batch")

"""Early-bird tickets: stop the dense training as soon as the mask that it draws stands still."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import select, sites
from prunus.arguments import check_sparsity
from prunus.core import Masks
from prunus.drive.progress import Progress, shown
from prunus.drive.signals import Sources, collect
from prunus.errors import ValueRangeError
from prunus.kinds import NORM_SCALE
from prunus.methods.loop import Loop
from prunus.methods.rounds import Book, Train


@dataclass(frozen=True)
class EarlyBird:
    """The ticket and how it was found.

    epoch: the last one trained, from 0; found: whether the mask stood still by then; masks: site
    name -> bool mask of the weight; distances: of the last epoch's mask to those before it;
    results: what `train` returned, epoch by epoch.
    """

    epoch: int
    found: bool
    masks: Masks
    distances: tuple[float, ...]
    results: tuple[Any, ...]


def early_bird(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    train: Train,
    *,
    sparsity: float,
    epochs: int,
    scope: Literal["channel", "element"] = "channel",
    tolerance: float = 0.1,
    window: int = 5,
    inputs: Any = None,
    include: sites.Patterns = None,
    exclude: sites.Patterns = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> EarlyBird:
    """Train until the masks of `window` epochs in a row differ by at most `tolerance`; then stop.

    After every epoch a mask is drawn, over all sites together: of the channels with the largest
    |gamma| of the batch norm behind them, or of the largest |w|; `sparsity` is the fraction of
    channels, or of weights, removed. The last mask is compared with each of the window - 1 before
    it, by the fraction of bits that differ. train(model, optimizer, epoch) trains one epoch, a Loop
    once through its loader. The model is left as it was trained; attach methods.fixed(result.masks)
    to go on with the ticket. inputs: one example batch, for "channel"; sites that no batch norm
    follows have to be excluded. folder: a checkpoint after every epoch, from which the same call
    goes on; progress: as for lottery_ticket.
    Source: You, Li, Xu, Fu, Wang, Chen, Baraniuk, Wang, Lin 2020, arXiv 1909.11957, algorithm 1,
    and the authors' code for the distances.
    """
    check_sparsity(sparsity)
    if epochs < 1 or window < 2 or not 0 <= tolerance <= 1 or scope not in ("channel", "element"):
        raise ValueRangeError(
            f"epochs >= 1, window >= 2, tolerance between 0 and 1, scope channel or element, got "
            f"{epochs}, {window}, {tolerance}, {scope!r}"
        )
    found = sites.find(model, include, exclude)
    settings = {
        "procedure": "early_bird",
        "sparsity": float(sparsity),
        "scope": scope,
        "tolerance": float(tolerance),
        "window": window,
        "sites": [[site.name, *site.shape] for site in found],
    }
    return _watched(
        model,
        make_optimizer,
        train,
        Book(None if folder is None else Path(folder), settings, train),
        found,
        lambda: _drawn(model, found, sparsity, scope, inputs),
        epochs,
        shown(progress, "early_bird"),
    )


def _watched(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    train: Train,
    book: Book,
    found: tuple[sites.Site, ...],
    draw: Callable[[], dict[str, Tensor]],
    epochs: int,
    show: Progress,
) -> EarlyBird:
    """Train epoch by epoch until the mask stands still, from the record on if there is one."""
    window, tolerance = book.settings["window"], book.settings["tolerance"]
    run = train.epoch if isinstance(train, Loop) else train
    optimizer = make_optimizer(model)
    queue: list[dict[str, Tensor]] = []
    results: list[Any] = []
    record = book.read("epoch")
    if record is not None:
        model.load_state_dict(record["model"])
        optimizer.load_state_dict(record["optimizer"])
        queue, results = record["queue"], record["results"]
        book.rewind_random(record)
    while True:
        distances = [_distance(queue[-1], other) for other in queue[:-1]]
        still = len(queue) == window and max(distances) <= tolerance
        if queue:
            furthest = f"{max(distances):.4f}" if distances else "-"
            show(len(results), epochs, f"largest mask distance {furthest}")
        if still or len(results) >= epochs:
            masks = _of_weights(found, queue[-1])
            return EarlyBird(len(results) - 1, still, masks, tuple(distances), tuple(results))
        results.append(run(model, optimizer, len(results)))
        queue = [*queue[1 - window :], draw()]
        held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        book.write("epoch", {**held, "queue": queue, "results": results})


def _drawn(
    model: nn.Module,
    found: tuple[sites.Site, ...],
    sparsity: float,
    scope: str,
    inputs: Any,
) -> dict[str, Tensor]:
    """Draw the mask of now: site -> bool tensor, of its outputs or of its weights."""
    parameters = sites.parameters(model, found)
    values = {name: weight.abs() for name, weight in sites.weights(parameters).items()}
    if scope == "channel":
        sources = Sources(sites.unwrap(model), found, parameters, {}, inputs)
        scales = collect(frozenset({NORM_SCALE}), sources).tensors[NORM_SCALE]
        values = {s.name: sites.turned(s, scales[s.name]).flatten(1)[:, 0] for s in found}
    rows = {n: select.check_scores(v, n).reshape(1, -1) for n, v in values.items()}
    keep = (1.0 - sparsity) * sum(row.numel() for row in rows.values())
    counts = select.global_counts(rows, dict.fromkeys(rows, 1), keep)
    return {n: select.keep_top(rows[n], counts[n]).reshape(v.shape) for n, v in values.items()}


def _distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the fraction of bits in which two masks differ."""
    total = sum(mask.numel() for mask in left.values())
    return sum(int((left[n] ^ right[n].to(left[n].device)).sum()) for n in left) / max(1, total)


def _of_weights(found: tuple[sites.Site, ...], bits: Mapping[str, Tensor]) -> Masks:
    """Give every weight of an output the bit of that output."""
    masks = {}
    for site in found:
        bit, shape = bits[site.name], sites.turned_shape(site)
        if tuple(bit.shape) != site.shape:
            wide = bit.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
            bit = sites.turned(site, wide.contiguous())
        masks[site.name] = bit.to(torch.bool)
    return masks

"""Moves of whole units: what a structure holds together is dropped and grown together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prunus import rng, select
from prunus.compose.within import move, units_on
from prunus.core import Structure
from prunus.errors import CompositionError, ShapeError
from prunus.training import products
from prunus.training.candidates import LargestGradients, attachment
from prunus.training.evident import evident
from prunus.training.layers import SparseWeight
from prunus.training.recipes import Recipe

Ranking = Callable[[int, int], Tensor]
"""(begin, end) -> a score of every weight of these rows, higher = grown first; asked in order."""


def structures_of(
    layers: Mapping[str, SparseWeight],
    structure: Structure | Mapping[str, Structure] | None,
    recipe: Recipe,
) -> dict[str, Structure]:
    """Return {layer: structure} of those that move in units; single weights are left out.

    Raises CompositionError for a recipe that moves single weights only, for places that are not
    whole units, and where places have an evident structure and none is given; ShapeError for a
    layer that a structure does not divide.
    """
    if structure is None:
        for name, layer in layers.items():
            shape = evident(layer.pattern, layer.shape)
            if shape is not None:
                raise CompositionError(
                    f"the weights of {name!r} come in {shape[0]}, which moves of single weights "
                    f"would break: pass structure={shape[1]} to keep it, or "
                    f"structure=structures.element() to give it up"
                )
        return {}
    given = structure if isinstance(structure, Mapping) else dict.fromkeys(layers, structure)
    unknown = [name for name in given if name not in layers]
    if unknown:
        raise CompositionError(
            f"structures for {', '.join(unknown)}; packed layers: {', '.join(layers)}"
        )
    found = {name: held for name, held in given.items() if held.name != "element"}
    for name, held in found.items():
        if recipe.turnover is None or recipe.score is None:
            raise CompositionError(
                f"{recipe.name} moves single weights and would break {held.name} of {name!r}: take "
                f"set_, rigl, itop or mest, or pr.attach with a method that has structure="
            )
        check_whole(name, layers[name], held)
    return found


def check_whole(name: str, layer: SparseWeight, structure: Structure) -> None:
    """Raise unless a layer stores whole units, as many in every row of units."""
    try:
        rows, units, _ = structure.layout(layer.shape)
    except ShapeError as error:
        raise ShapeError(f"layer {name!r}: {structure.name}: {error}") from None
    counts = set()
    for begin, end in _pieces(structure, layer.shape):
        mask = _mask(layer, begin, end)
        on = units_on(structure, mask)
        counts.update(on.sum(1).tolist() if rows > 1 else ())
        if not torch.equal(structure.expand(on, tuple(mask.shape)), mask):
            raise CompositionError(
                f"the weights of {name!r} are not whole units of {structure.name}: draw them with "
                f"sparse_training(model, sparsity, structure=...), or pass masks of that structure"
            )
    wanted = None if structure.pinned is None else round((1 - structure.pinned) * units)
    if len(counts) > 1 or (counts and wanted is not None and counts != {wanted}):
        raise CompositionError(
            f"{structure.name} keeps {wanted or 'as many'} units in every group, but those of "
            f"{name!r} have {min(counts)} to {max(counts)}: draw them with "
            f"sparse_training(model, sparsity, structure=...), or pass masks of that structure"
        )


def moved(
    layer: SparseWeight, structure: Structure, score: Tensor, ranking: Ranking, turnover: float
) -> tuple[Tensor, Tensor]:
    """Return (drop bool [nnz], flat places to grow): `compose`'s move of units, piece by piece.

    score: of the stored weights [nnz]; a unit has the sum (or mean) over its own, as `reduce` says.
    Only pieces of the weight are made dense, a number per unit is held; of a structure that spans
    all outputs the piece is the whole.
    """
    width = layer.pattern.shape[1]
    rows, _, _ = structure.layout(layer.shape)
    pieces = _pieces(structure, layer.shape)
    alone = rows > 1 and structure.pinned is None  # rows that do not compete with each other
    drop, grow = [], []
    for group in ([piece] for piece in pieces) if alone else (pieces,):
        read = [_units(layer, structure, score, ranking, *piece) for piece in group]
        axis = 0 if rows > 1 else 1
        on, scores, ranks = (torch.cat(parts, axis) for parts in zip(*read, strict=True))
        count = int(on.sum(1).min())
        stay, added = move(on, scores, ranks, count, turnover, structure.pinned is not None)
        after = (stay | added).split([part[0].shape[axis] for part in read], axis)
        for (begin, end), keep in zip(group, after, strict=True):
            old = _mask(layer, begin, end).reshape(-1)
            new = structure.expand(keep, (end - begin, *layer.shape[1:])).reshape(-1)
            drop.append(~new[layer.pattern.row_places(begin, end)])
            grow.append((new & ~old).nonzero().flatten() + begin * width)
    return torch.cat(drop), torch.cat(grow)


def ranking_of(
    rule: str, layer: SparseWeight, key: rng.Key, watch: LargestGradients | None
) -> Ranking | None:
    """What growth ranks by, as the masked method does; None where no backward pass looked.

    key: seed, step, round and the dense weight's name.
    """
    tail = layer.shape[1:]
    if rule == "random":
        generator = rng.generator((*key, "grow"))
        return lambda begin, end: torch.rand((end - begin, *tail), generator=generator)
    if rule == "preferential":
        draw = attachment(layer.pattern, (*key, "grow"), math.prod(layer.shape[2:]))
        return lambda begin, end: draw(begin, end).float().reshape(end - begin, *tail)
    if watch is None or not watch.holds:
        return None
    return lambda begin, end: watch.rows(begin, end).abs().cpu().reshape(end - begin, *tail)


def _pieces(structure: Structure, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of outputs whose units are their own, of about products.BLOCK weights."""
    each = structure.outputs or shape[0]
    height = each * max(1, products.BLOCK // max(1, each * math.prod(shape[1:])))
    return [(begin, min(shape[0], begin + height)) for begin in range(0, shape[0], height)]


def _mask(layer: SparseWeight, begin: int, end: int) -> Tensor:
    flat = torch.zeros((end - begin) * layer.pattern.shape[1], dtype=torch.bool)
    flat[layer.pattern.row_places(begin, end)] = True
    return flat.reshape(end - begin, *layer.shape[1:])


def _units(
    layer: SparseWeight,
    structure: Structure,
    score: Tensor,
    ranking: Ranking,
    begin: int,
    end: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which units are on, their scores and their ranks, [rows, units] of a piece."""
    dense = products.unpacked(layer.pattern, score, begin, end)
    ranks = select.check_scores(ranking(begin, end), "what grows")
    on = units_on(structure, _mask(layer, begin, end))
    held = structure.reduce(dense.reshape(end - begin, *layer.shape[1:]))
    return on, held, structure.reduce(ranks)

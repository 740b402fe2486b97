"""Check a structure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.checks.probes import DTYPES, SHAPES, same, twice, weight
from prunus.checks.rules import Judge
from prunus.core import Structure
from prunus.errors import ShapeError

_EVERY_UNIT = 64
"""Units up to this number are expanded one by one; of more, a random half."""


def check_structure(
    structure: Structure,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> None:
    """Raise ContractError, with the rule that broke and its repair, unless `structure` fits.

    shapes: of weights; those that the structure refuses with ShapeError are passed over.
    """
    judge = Judge("structure", structure)
    judge("type", isinstance(structure, Structure), f"it is a {type(structure).__name__}")
    judge("type", bool(structure.name) and isinstance(structure.name, str), "it has no name")
    pinned = structure.pinned
    judge("pinned", pinned is None or 0.0 <= pinned <= 1.0, f"pinned is {pinned!r}")
    accepted = 0
    for shape in shapes:
        layout = _layout(judge, structure, shape)
        if layout is None:
            continue
        accepted += bool(math.prod(shape))
        _check_reduce(judge, structure, shape, layout, dtypes)
        _check_expand(judge, structure, shape, layout)
        _check_local(judge, structure, shape, layout)
        _check_pieces(judge, structure, shape, layout)
    judge("refusal", accepted > 0, f"it refuses all of {list(shapes)}")


def _layout(
    judge: Judge, structure: Structure, shape: tuple[int, ...]
) -> tuple[int, int, int] | None:
    try:
        layout = structure.layout(shape)
    except ShapeError:
        return None
    except (ArithmeticError, LookupError, TypeError, RuntimeError, ValueError) as error:
        judge("refusal", False, f"layout({shape}) raised {error!r}")
        raise
    fits = (
        isinstance(layout, tuple)
        and len(layout) == 3
        and all(isinstance(n, int) and n >= 0 for n in layout)
        and math.prod(layout) == math.prod(shape)
    )
    judge("layout", fits, f"layout({shape}) is {layout!r}")
    if structure.pinned is not None and layout[1]:
        kept = (1.0 - structure.pinned) * layout[1]
        judge("pinned", abs(kept - round(kept)) < 1e-6, f"{kept:g} of {layout[1]} units are kept")
    return layout


def _check_reduce(
    judge: Judge,
    structure: Structure,
    shape: tuple[int, ...],
    layout: tuple[int, int, int],
    dtypes: Sequence[torch.dtype],
) -> None:
    for dtype in dtypes:
        score = weight(shape, dtype)
        where = f"reduce of {shape} {dtype}"
        units = twice(judge, where, lambda s=score: structure.reduce(s), score=score)
        fits = isinstance(units, Tensor) and tuple(units.shape) == layout[:2]
        judge("reduce", fits, f"{where} returned {getattr(units, 'shape', type(units))}")
        judge("reduce", units.is_floating_point(), f"{where} returned {units.dtype}")
        judge("reduce", not bool(units.isnan().any()), f"{where} returned NaN")
        if len(shape) > 1:
            loose = score.transpose(0, 1).contiguous().transpose(0, 1)
            judge(
                "strides", same(units, structure.reduce(loose)), f"{where}, not contiguous, differs"
            )


def _check_expand(
    judge: Judge, structure: Structure, shape: tuple[int, ...], layout: tuple[int, int, int]
) -> None:
    rows, units, size = layout
    covered = torch.zeros(shape, dtype=torch.int64)
    for keep in _keeps(rows, units):
        where = f"expand to {shape}"
        mask = twice(judge, where, lambda k=keep: structure.expand(k, shape), keep=keep)
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == shape
        judge("expand", fits, f"{where} returned {getattr(mask, 'dtype', mask)}")
        judge(
            "partition",
            int(mask.sum()) == int(keep.sum()) * size,
            f"{int(keep.sum())} units of {size} elements became {int(mask.sum())} in {shape}",
        )
        back = structure.reduce(mask.float()) > 0
        judge(
            "inverse",
            not size or same(back, keep),
            f"reduce(expand(keep)) is another keep for {shape}",
        )
        covered += mask if int(keep.sum()) == 1 and rows * units <= _EVERY_UNIT else 0
    if 0 < rows * units <= _EVERY_UNIT:
        once = bool((covered == 1).all())
        judge("partition", once, f"the units do not cover every element of {shape} exactly once")


def _check_pieces(
    judge: Judge, structure: Structure, shape: tuple[int, ...], layout: tuple[int, int, int]
) -> None:
    """Cut a weight between outputs: the pieces have the units of the whole, in order."""
    height = structure.outputs
    judge("outputs", isinstance(height, int) and height >= 0, f"outputs is {height!r}")
    if not height or not math.prod(shape):
        return
    judge("outputs", shape[0] % height == 0, f"{shape} is accepted, {height} do not divide it")
    axis, where = int(layout[0] == 1), f"pieces of {height} outputs of {shape}"
    score, keep = weight(shape, torch.float64), weight(layout[:2], key="keep") > 0
    apart = torch.cat([structure.reduce(part) for part in score.split(height)], axis)
    judge("outputs", apart.shape == keep.shape, f"{where} have {tuple(apart.shape)} units")
    near = torch.allclose(apart, structure.reduce(score))
    judge("outputs", near, f"{where} score differently")
    each = keep.split(keep.shape[axis] // (shape[0] // height), axis)
    masks = [structure.expand(part, (height, *shape[1:])) for part in each]
    judge("outputs", same(torch.cat(masks), structure.expand(keep, shape)), f"{where} differ")


def _keeps(rows: int, units: int) -> list[Tensor]:
    keeps = [torch.zeros(rows, units, dtype=torch.bool), torch.ones(rows, units, dtype=torch.bool)]
    keeps.append(weight((rows, units), key="keep") > 0)
    if 1 < rows * units <= _EVERY_UNIT:
        keeps += list(torch.eye(rows * units, dtype=torch.bool).reshape(-1, rows, units))
    return keeps if rows * units > 1 else keeps[:2]


def _check_local(
    judge: Judge, structure: Structure, shape: tuple[int, ...], layout: tuple[int, int, int]
) -> None:
    """Raise one element after the other: its own unit gains, all others stay as they are."""
    score = weight(shape, torch.float64).abs()
    before = structure.reduce(score)
    for place in range(0, score.numel(), max(1, score.numel() // 8)):
        raised = score.clone()
        raised.view(-1)[place] += 8.0
        own = torch.zeros(shape)
        own.view(-1)[place] = 1.0
        unit = structure.reduce(own) > 0
        after = structure.reduce(raised)
        fits = bool((after > before)[unit].all()) and same(after[~unit], before[~unit])
        judge("local", fits, f"raising element {place} of {shape} changed the wrong units")

"""Check a solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunus.checks.probes import DTYPES, SHAPES, MakeSignal, default_signal, is_names, twice, weight
from prunus.checks.rules import Judge
from prunus.checks.values import context
from prunus.core import Context, Solver, Structure
from prunus.errors import ShapeError, SignalError
from prunus.structures import block, channel, element, n_of_m


def check_solver(
    solver: Solver,
    *,
    structures: Sequence[Structure] | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    signal: MakeSignal = default_signal,
) -> None:
    """Raise ContractError, with the rule that broke and its repair, unless `solver` fits its slot.

    structures: element, block, channel and 2:4 if left out; each with every k that matters.
    """
    judge = Judge("solver", solver)
    judge("type", isinstance(solver, Solver), f"it is a {type(solver).__name__}")
    judge("type", bool(solver.name) and isinstance(solver.name, str), "it has no name")
    judge("needs", is_names(solver.needs), f"needs is {solver.needs!r}")
    if structures is None:
        structures = (element(), block(2, 2), channel(0), channel(1), n_of_m(2, 4))
    for structure in structures:
        for shape in shapes:
            try:
                units = structure.layout(shape)[1]
            except ShapeError:
                continue
            for k in sorted({0, min(1, units), units // 3, max(0, units - 1), units}):
                # every k in one dtype, every dtype with one k
                for dtype in dtypes if k == units // 3 else dtypes[:1]:
                    _check_one(judge, solver, structure, weight(shape, dtype), k, signal)


def _check_one(
    judge: Judge, solver: Solver, structure: Structure, w: Tensor, k: int, signal: MakeSignal
) -> None:
    at = context(w, solver.needs, signal)
    scores = structure.reduce(w.abs())
    off = torch.zeros_like(scores, dtype=torch.bool)
    off[:, : scores.shape[1] - k] = True
    where = f"solve with {structure.name} on {tuple(w.shape)} {w.dtype}, k={k},"
    for given in (scores, scores * 0, scores.masked_fill(off, float("-inf"))):
        try:
            result = twice(
                judge,
                where,
                lambda s=given: solver.solve(w, s, k, structure, at),
                w=w,
                scores=given,
                signals=at.signals,
            )
        except SignalError as error:
            judge("needs", False, f"{where} read a signal that is not declared ({error})")
            raise
        judge("mask", isinstance(result, tuple) and len(result) == 2, f"{where} gave {result!r}")
        mask, new = result
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == w.shape
        judge("mask", fits, f"{where} gave a mask {getattr(mask, 'dtype', mask)}")
        _check_count(judge, structure, mask, k, where)
        if bool((given == float("-inf")).any()):
            kept = structure.reduce(mask.float()) > 0
            judge("off", not bool((kept & off).any()), f"{where} kept a unit that is off")
        if new is not None:
            fits = isinstance(new, Tensor) and new.shape == w.shape and new.dtype == w.dtype
            judge("weights", fits, f"{where} gave new weights {getattr(new, 'shape', new)}")
            judge("weights", bool(torch.isfinite(new).all()), f"{where} gave weights not finite")
        if solver.shift is not None:
            became = (w if new is None else new).masked_fill(~mask, 0)
            _check_shift(judge, solver.shift, w, became, at, where)


def _check_shift(
    judge: Judge,
    shift: Callable[[Tensor, Tensor, Context], Tensor],
    w: Tensor,
    new: Tensor,
    at: Context,
    where: str,
) -> None:
    found = twice(judge, where, lambda: shift(w, new, at), w=w, new=new, signals=at.signals)
    fits = isinstance(found, Tensor) and found.shape == w.shape[:1]
    judge("shift", fits, f"{where} shifts the bias by {getattr(found, 'shape', found)}")
    judge("shift", bool(torch.isfinite(found).all()), f"{where} shifts the bias by NaN or infinity")


def _check_count(judge: Judge, structure: Structure, mask: Tensor, k: int, where: str) -> None:
    rows, units, size = structure.layout(tuple(mask.shape))
    kept = structure.reduce(mask.float()) > 0
    exact = rows * units * size == 0 or bool((kept.sum(1) == k).all())
    judge("count", exact, f"{where} kept {kept.sum(1).tolist()[:4]} units in its rows")
    whole = int(mask.sum()) == int(kept.sum()) * size
    judge("count", whole, f"{where} kept parts of units")

"""What a score and a growth have in common: `value(w, context)` of one site."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunus.checks.probes import MakeSignal, same, twice, weight
from prunus.checks.rules import Judge
from prunus.core import Context, Site
from prunus.errors import SignalError

Value = Callable[[Tensor, Context], Tensor]


def context(
    w: Tensor, needs: frozenset[str], signal: MakeSignal, mask: Tensor | None = None
) -> Context:
    """Return the context of a site that holds w, with the signals that are declared."""
    signals = {kind: signal(kind, w) for kind in sorted(needs)}
    site = Site("check.weight", tuple(w.shape))
    return Context(site, signals, mask, (0, 0, 0, site.name))


def check_value(
    judge: Judge,
    value: Value,
    needs: frozenset[str],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    signal: MakeSignal,
) -> None:
    """Hold `value` to the rules of tensors: shape, dtype, finite, nan, strides, same, pure."""
    for dtype in dtypes:
        for shape in shapes:
            w = weight(shape, dtype)
            for mask in (None, weight(shape, key="mask") > 0):
                _check_one(judge, value, w, context(w, needs, signal, mask))
    _check_strides(judge, value, needs, signal, dtypes[0])
    _check_nan(judge, value, needs, signal, dtypes[0])


def _check_one(judge: Judge, value: Value, w: Tensor, at: Context) -> None:
    where = f"value on {tuple(w.shape)} {w.dtype}"
    given = {"w": w, "signals": at.signals, **({} if at.mask is None else {"mask": at.mask})}
    try:
        result = twice(judge, where, lambda: value(w, at), **given)
    except SignalError as error:
        judge("needs", False, f"{where} read a signal that is not declared ({error})")
        raise
    judge("shape", isinstance(result, Tensor), f"{where} returned {type(result).__name__}")
    judge("shape", result.shape == w.shape, f"{where} returned shape {tuple(result.shape)}")
    judge("dtype", result.is_floating_point(), f"{where} returned {result.dtype}")
    judge("finite", not bool(result.isnan().any()), f"{where} returned NaN")


def _check_strides(
    judge: Judge, value: Value, needs: frozenset[str], signal: MakeSignal, dtype: torch.dtype
) -> None:
    w = weight((6, 4), dtype)
    at = context(w, needs, signal)
    loose = w.t().contiguous().t()
    judge(
        "strides",
        same(value(w, at), value(loose, at)),
        "a weight that is not contiguous got other values than the same weight made contiguous",
    )


def _check_nan(
    judge: Judge, value: Value, needs: frozenset[str], signal: MakeSignal, dtype: torch.dtype
) -> None:
    w = weight((3, 5), dtype)
    at = context(w, needs, signal)
    clean = value(w, at)
    for kind in ("the weight", *at.signals):
        bad = (w if kind == "the weight" else at.signals[kind]).clone()
        bad.view(-1)[0] = float("nan")
        if kind == "the weight":
            result = value(bad, at)
        else:
            result = value(w, Context(at.site, {**at.signals, kind: bad}, at.mask, at.key))
        seen = bool(result.isnan().any()) or same(result, clean)
        judge("nan", seen, f"a NaN in {kind} was turned into an ordinary number")

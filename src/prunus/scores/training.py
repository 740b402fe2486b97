"""Scores that grow while the network trains: they observe every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.core import Context, Score
from prunus.errors import ValueRangeError
from prunus.kinds import GRADIENT


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def movement() -> Score:
    """Keep weights that move away from zero: S = -sum over the steps so far of dL/dw * w.

    Starts at zero with the training; memory: one tensor of the size of every site, in float32.
    Source: Sanh, Wolf, Rush 2020, arXiv 2005.07683, section 3. Differs: without the learning rate
    of the scores, which scales them all; a weight that is off counts as 0 and gathers nothing.
    """

    def observe(w: Tensor, at: Context) -> Mapping[str, Tensor]:
        moved = -_wide(at[GRADIENT]) * _wide(w)
        old = at.memory.get("movement")
        return {"movement": moved if old is None else old + moved}

    def value(w: Tensor, at: Context) -> Tensor:
        return at.memory.get("movement", torch.zeros_like(_wide(w)))

    return Score("movement", value, observe=observe, watches=frozenset({GRADIENT}))


def total_change(rate: float = 1.0) -> Score:
    """Keep weights by the loss that they took away: S = sum (dw)^2 * w / (rate (w - w_0)).

    The sum runs over the steps dw of plain gradient descent with learning rate `rate`, and
    sum (dw)^2 / rate is the fall of the loss along the way from w_0, the first weight seen, to w;
    S continues it from w to 0. Negative for a weight on its way to zero. A weight that came back to
    w_0 counts with its sum alone. Memory: three tensors of the size of every site.
    Source: Karnin 1990, IEEE Trans. Neural Networks 1.
    """
    if rate <= 0:
        raise ValueRangeError(f"the learning rate is above 0, got {rate}")

    def observe(w: Tensor, at: Context) -> Mapping[str, Tensor]:
        now = _wide(w).clone()
        if "change" not in at.memory:
            return {"change": torch.zeros_like(now), "last": now, "first": now.clone()}
        step = (now - at.memory["last"]).square()
        return {"change": at.memory["change"] + step, "last": now, "first": at.memory["first"]}

    def value(w: Tensor, at: Context) -> Tensor:
        now = _wide(w)
        if "change" not in at.memory:
            return torch.zeros_like(now)
        way = now - at.memory["first"]
        still = way == 0
        ratio = torch.where(still, 1.0, now / torch.where(still, 1.0, way))
        return at.memory["change"] * ratio / rate

    return Score("total_change", value, observe=observe)

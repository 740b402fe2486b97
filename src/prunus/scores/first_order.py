"""Scores from the first-order expansion of the loss: L(w + d) - L(w) ~ dL/dw . d."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.core import FLOW, GRADIENT, Context, Score


def _product(w: Tensor, at: Context) -> Tensor:
    """Return dL/dw * w, at least in float32: in half precision the squares underflow."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return at[GRADIENT].to(wide) * w.to(wide)


def taylor() -> Score:
    """Keep weights whose removal changes the loss most: (dL/dw * w)^2.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771, eq. 8 for single
    weights. Differs: a group's importance sums these squares over its members (their eq. 8 for a
    set of parameters taken one by one), not the square of the sum.
    """
    return Score("taylor", lambda w, at: _product(w, at).square(), frozenset({GRADIENT}))


def snip() -> Score:
    """Keep connections that the loss is sensitive to: |dL/dw * w|, at initialisation.

    Source: Lee, Ajanthan, Torr 2019, arXiv 1810.02340, eq. 4-5. Differs: not divided by the sum
    over all weights, which does not change the order.
    """
    return Score("snip", lambda w, at: _product(w, at).abs(), frozenset({GRADIENT}))


def synflow() -> Score:
    """Keep weights that carry synaptic flow: dR/d|w| * |w|, R = 1^T (prod_l |W_l|) 1. No data.

    The scores of a layer sum to R in every layer (conservation), which is why no layer collapses.
    Source: Tanaka, Kunin, Yamins, Ganguli 2020, arXiv 2006.05467, eq. 3.
    """
    return Score("synflow", lambda w, at: at[FLOW] * w.abs().to(at[FLOW].dtype), frozenset({FLOW}))

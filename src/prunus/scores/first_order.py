"""Scores from the first-order expansion of the loss: L(w + d) - L(w) ~ dL/dw . d."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.core import Context, Score
from prunus.errors import ValueRangeError
from prunus.kinds import FLOW, GRADIENT, HESSIAN_GRADIENT, RESERVE


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
    return Score("taylor", lambda w, at: _product(w, at).square_(), frozenset({GRADIENT}), True)


def snip() -> Score:
    """Keep connections that the loss is sensitive to: |dL/dw * w|, at initialisation.

    Source: Lee, Ajanthan, Torr 2019, arXiv 1810.02340, eq. 4-5. Differs: not divided by the sum
    over all weights, which does not change the order.
    """
    return Score("snip", lambda w, at: _product(w, at).abs_(), frozenset({GRADIENT}), True)


def synflow() -> Score:
    """Keep weights that carry synaptic flow: dR/d|w| * |w|, R = 1^T (prod_l |W_l|) 1. No data.

    The scores of a layer sum to R in every layer (conservation), which is why no layer collapses.
    Source: Tanaka, Kunin, Yamins, Ganguli 2020, arXiv 2006.05467, eq. 3.
    """
    return Score("synflow", lambda w, at: at[FLOW] * w.abs().to(at[FLOW].dtype), frozenset({FLOW}))


def grasp() -> Score:
    """Keep connections that carry gradient flow: w * (H g), the rise of g^T g that w stands for.

    Removing w changes g^T g by -2 w (H g) to first order, so that the weights with the largest
    S = -w (H g) go first. Source: Wang, Zhang, Grosse 2020, arXiv 2002.07376, eq. 8, algorithm 1.
    Differs: the loss is used as it is given; the paper divides the logits by 200 first.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        wide = torch.promote_types(w.dtype, torch.float32)
        return w.to(wide) * at[HESSIAN_GRADIENT].to(wide)

    return Score("grasp", value, frozenset({HESSIAN_GRADIENT}))


def force() -> Score:
    """Keep connections by |dL/dw * w|, w also of what is off: the value that it would return with.

    The gradient is that of the masked network. Compose it with revive=True and remember=True.
    Source: de Jorge, Sanyal, Behl, Torr, Rogez, Dokania 2021, arXiv 2006.09081, eq. 6 (FORCE).
    """

    def value(w: Tensor, at: Context) -> Tensor:
        hidden = at.memory.get(RESERVE)
        return _product(w if hidden is None else w + hidden.to(w), at).abs()

    return Score("force", value, frozenset({GRADIENT}))


def taylor_group(axis: int = 0) -> Score:
    """Keep slices whose removal as a whole changes the loss: (sum over the slice of dL/dw * w)^2.

    Spread evenly over the slice, so that `structures.channel(axis)` sums to it; axis 0: outputs,
    1: inputs. Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771, eq. 8.
    """
    if axis not in (0, 1):
        raise ValueRangeError(f"axis is 0 (outputs) or 1 (inputs), got {axis}")

    def value(w: Tensor, at: Context) -> Tensor:
        along = 1 - axis if at.site.transposed else axis
        product = _product(w, at).movedim(along, 0).contiguous()
        slices = product.flatten(1).sum(1).square() / max(1, product[:1].numel())
        narrow = [1] * w.ndim
        narrow[along] = w.shape[along]
        return slices.reshape(narrow).expand(w.shape).contiguous()

    return Score(f"taylor_group({axis})", value, frozenset({GRADIENT}))

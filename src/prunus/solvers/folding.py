"""Solvers that hand what a removed input gave on: to the bias, or to another input."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.kinds import GRAM, INPUT_MEAN
from prunus.solvers.selection import top_k
from prunus.solvers.units import chosen, columns_of, forced_off


def fold(base: Solver | None = None) -> Solver:
    """Let the bias take the mean of what goes: b' = b + (W - W') E[x], whatever `base` does.

    With b' free, the error E |W'x + b' - Wx - b|^2 that remains is that of the centred inputs, so
    that a base which reads E[x x^T] gets the covariance E[x x^T] - E[x] E[x]^T instead. base: the
    solver that chooses and rewrites, `top_k()` if left out. Works with every structure. Layers
    need a bias. Source: Sietsma & Dow 1988, IEEE ICNN (a unit of constant output goes into the
    biases that it feeds).
    """
    inner = base or top_k()

    def centred(at: Context) -> Context:
        if GRAM not in inner.needs:
            return at
        mean = at[INPUT_MEAN].double()
        gram = at[GRAM].double() - mean[:, :, None] * mean[:, None, :]
        return replace(at, signals={**at.signals, GRAM: gram})

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        return inner.solve(w, scores, k, structure, centred(at))

    def shift(w: Tensor, new: Tensor, at: Context) -> Tensor:
        mean = at[INPUT_MEAN].double()
        change = (w.double() - new.double()).reshape(len(mean), -1, mean.shape[1])
        own = (change @ mean[:, :, None]).flatten()
        inner_shift = None if inner.shift is None else inner.shift(w, new, centred(at))
        return own if inner_shift is None else own + inner_shift

    return Solver(f"fold({inner.name})", solve, inner.needs | {INPUT_MEAN}, shift)


def merge(scaled: bool = False) -> Solver:
    """Merge inputs that are alike: the one that goes hands its weights on, w_i <- w_i + w_j.

    Of all pairs the one of least |w_j|^2 E[(x_i - x_j)^2] is merged, again and again. scaled: also
    inputs that are multiples: w_i <- w_i + c w_j with c = E[x_i x_j] / E[x_i^2], which leaves
    E[(x_j - c x_i)^2]. The scores are not read. For `channel(1)`; for other structures the scores
    choose and nothing is merged.
    Source: Srinivas & Babu 2015, arXiv 1507.06149, eqs. 4 to 6. Differs: E[(x_i - x_j)^2] is
    measured, where the paper bounds it by the distance of the incoming weights; the inputs of one
    layer are merged, each reader of a neuron by itself.
    """

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        shape = tuple(w.shape)
        units = columns_of(structure, shape)
        if units is None or k in (0, len(units)):
            return chosen(scores, k, structure, shape), None
        model = quadratic.checked(quadratic.of_inputs(w, at, 0.0), at)
        model = replace(model, h=at[GRAM].double())  # not damped: what is alike is alike
        kept, new = _merged(model, units, k, forced_off(scores, k)[0], scaled)
        return structure.expand(kept[None], shape), model.back(new).to(w.dtype)

    return Solver("merge(scaled)" if scaled else "merge", solve, frozenset({GRAM}))


def _merged(
    model: quadratic.Quadratic, units: Tensor, k: int, off: Tensor, scaled: bool
) -> tuple[Tensor, Tensor]:
    """Return what stays, bool [units], and the weights, [groups, outputs, columns]."""
    own = model.h[:, units[:, None, :], units[None, :, :]].sum(3)  # E[x_i x_j], [groups, u, u]
    square = own.diagonal(dim1=1, dim2=2)
    if scaled:
        factor = torch.where(square[:, :, None] > 0, own / square[:, :, None], 0.0)
        apart = square[:, None, :] - own * factor
    else:
        factor = torch.ones_like(own)
        apart = square[:, :, None] + square[:, None, :] - 2 * own
    apart = apart.clamp(min=0)  # [groups, i that stays, j that goes]
    w = model.w[:, :, units].clone()  # [groups, outputs, units, p]
    kept = torch.ones_like(off)
    for _ in range(len(units) - k):
        norms = w.square().sum(dim=(1, 3))
        cost = (apart * norms[:, None, :]).sum(0)
        cost = cost.masked_fill(~kept[:, None] | ~kept[None, :], torch.inf)
        cost.fill_diagonal_(torch.inf)
        first = off & kept
        if bool(first.any()):  # what is off goes first, into something that may stay
            cost[:, ~first] = torch.inf
            cost[off] = torch.inf
        place = int(cost.argmin())
        stays, goes = divmod(place, len(units))
        w[:, :, stays] += factor[:, stays, goes][:, None, None] * w[:, :, goes]
        w[:, :, goes] = 0.0
        kept[goes] = False
    new = torch.zeros_like(model.w)
    new[:, :, units.flatten()] = w.flatten(2)
    return kept, new

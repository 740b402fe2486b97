"""EigenDamage: cut layers in the eigenbasis of their Kronecker-factored Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus import sites as sites_
from prunus.arguments import check_sparsity
from prunus.core import Site
from prunus.drive.data import batches_of
from prunus.drive.registry import attached
from prunus.drive.signals import Loss, Sources, collect
from prunus.errors import AttachError, NotFiniteError, ShapeError, SiteError, TargetError
from prunus.kinds import GRAM, OUTPUT_GRAM


@dataclass(frozen=True)
class Rotated:
    """What became of a layer: inputs and outputs of its middle factor, parameters before and after.

    A layer that would not get smaller stays as it was, with `rank` None.
    """

    rank: tuple[int, int] | None
    before: int
    after: int


def eigendamage(
    model: nn.Module,
    sparsity: float,
    *,
    batches: Iterable[Any],
    loss: Loss,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
) -> dict[str, Rotated]:
    """Replace layers by three thin ones that meet in the eigenbasis of the Fisher matrix, in place.

    With A = Q_A L_A Q_A^T, G = Q_G L_G Q_G^T (see scores.kfac) and W* = Q_G^T W Q_A the Fisher
    matrix of W* is nearly diagonal, and removing row r or column c of W* costs the sum over it of
    W*_rc^2 L_G,r L_A,c / 2. One threshold over the rows and columns of all layers; a layer becomes
    Q_A[:, C]^T, W*[R, C], Q_G[:, R] and its bias. No mask on w describes this, so it is no
    Sparsifier: what is left is dense and smaller, and stays trainable.
    sparsity: the least fraction of the weights of the sites that goes, the rotations counted.
    Linear layers and convolutions without groups; of a convolution the input channels are rotated
    (A: mean over kernel positions) by 1 x 1 convolutions. Returns site -> Rotated. Raises SiteError
    for other sites, TargetError if one direction a layer is still too much.
    Source: Wang, Grosse, Fidler, Zhang 2019, arXiv 1905.05934, sections 4.1 and 4.2. Differs:
    empirical Fisher; the threshold is searched for a number of weights, not of rows and columns.
    """
    check_sparsity(sparsity)
    if attached(model) is not None:
        raise AttachError("a sparsifier is attached to this model: detach it before layers change")
    model = sites_.unwrap(model)
    found = sites_.find(model, include, exclude)
    owners = {site.name: _owner(model, site) for site in found}
    data = batches_of(batches)
    sources = Sources(model, found, sites_.parameters(model, found), {}, None, data, loss)
    signals = collect(frozenset({GRAM, OUTPUT_GRAM}), sources)
    for kind, values in signals.tensors.items():
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise NotFiniteError(
                    f"the {kind} of site {name!r} holds NaN or infinity: look for it in the "
                    f"calibration batches; nothing was changed"
                )
    bases = {s.name: _Basis.of(owners[s.name][2], signals.at(s.name)) for s in found}
    total = sum(site.size for site in found)
    level = _threshold(list(bases.values()), (1.0 - sparsity) * total)
    if level is None:
        raise TargetError(
            f"asked for a sparsity of {sparsity:g}, but with one direction left in each of "
            f"{', '.join(bases)} more stays; ask for less, or exclude none of them"
        )
    result = {}
    for site in found:
        parent, own, module = owners[site.name]
        rows, columns = bases[site.name].kept(level)
        after = bases[site.name].size(level)
        if after == site.size:
            result[site.name] = Rotated(None, site.size, site.size)
            continue
        setattr(parent, own, _thin(module, bases[site.name], rows, columns))
        result[site.name] = Rotated((int(columns.sum()), int(rows.sum())), site.size, after)
    return result


def _owner(model: nn.Module, site: Site) -> tuple[nn.Module, str, nn.Module]:
    """Return the parent, the name in it and the module of a site; SiteError if it is not known."""
    path, _, own = site.name.rpartition(".")
    outer, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    convolution = isinstance(module, nn.Conv2d) and module.groups == 1
    if own != "weight" or not (type(module) is nn.Linear or convolution) or not path:
        raise SiteError(
            f"{site.name!r} (shape {site.shape}) is no linear layer or two-dimensional convolution "
            f"without groups inside of the model, so it has no factors to rotate; exclude it"
        )
    if site.aliases:
        raise SiteError(f"{site.name!r} is tied to {', '.join(site.aliases)}; exclude it")
    return model.get_submodule(outer), name, module


@dataclass(frozen=True)
class _Basis:
    """inputs: Q_A, outputs: Q_G; w: W* [outputs, inputs, positions]; cost of rows and columns."""

    inputs: Tensor
    outputs: Tensor
    w: Tensor
    rows: Tensor
    columns: Tensor

    @staticmethod
    def of(module: Any, given: dict[str, Tensor]) -> _Basis:
        weight = module.weight.detach().double().flatten(2) if module.weight.ndim > 2 else None
        w = module.weight.detach().double()[:, :, None] if weight is None else weight
        channels, positions = w.shape[1], w.shape[2]
        a, g = given[GRAM].double()[0], given[OUTPUT_GRAM].double()[0]
        if len(a) != channels * positions:
            raise ShapeError(f"the Gram matrix is {tuple(a.shape)}, the weight {tuple(w.shape)}")
        grid = a.reshape(channels, positions, channels, positions)
        a = grid.diagonal(dim1=1, dim2=3).mean(-1)
        inner, inputs = torch.linalg.eigh(a)
        outer, outputs = torch.linalg.eigh(g)
        rotated = torch.einsum("or,oip,ic->rcp", outputs, w, inputs)
        cost = rotated.square().sum(2) * outer.clamp(min=0)[:, None] * inner.clamp(min=0) / 2
        return _Basis(inputs, outputs, rotated, cost.sum(1), cost.sum(0))

    def kept(self, level: float) -> tuple[Tensor, Tensor]:
        """Return which rows and columns cost more than level; at least the dearest of each."""
        rows, columns = self.rows > level, self.columns > level
        rows[self.rows.argmax()] = columns[self.columns.argmax()] = True
        return rows, columns

    def size(self, level: float) -> int:
        """Return the weights that are left: of three factors, or of the layer if that is less."""
        rows, columns = (int(on.sum()) for on in self.kept(level))
        thin = len(self.inputs) * columns + rows * columns * self.w.shape[2]
        return min(self.w.numel(), thin + rows * len(self.outputs))


def _threshold(bases: list[_Basis], room: float) -> float | None:
    """Return the lowest cost below which rows and columns have to go; None if none suffices."""
    costs = torch.cat([torch.cat([basis.rows, basis.columns]) for basis in bases])
    levels = [-math.inf, *torch.unique(costs).tolist()]
    low, high = 0, len(levels) - 1
    if sum(basis.size(levels[high]) for basis in bases) > room:
        return None
    while low < high:
        middle = (low + high) // 2
        if sum(basis.size(levels[middle]) for basis in bases) > room:
            low = middle + 1
        else:
            high = middle
    return levels[low]


@torch.no_grad()
def _thin(module: Any, basis: _Basis, rows: Tensor, columns: Tensor) -> nn.Sequential:
    """Build the three layers of a bottleneck."""
    down = basis.inputs[:, columns].T  # [columns, inputs]
    middle = basis.w[rows][:, columns]
    up = basis.outputs[:, rows]  # [outputs, rows]
    bias = module.bias is not None
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        parts: list[Any] = [
            nn.Linear(down.shape[1], len(down), bias=False, **like),
            nn.Linear(len(down), len(middle), bias=False, **like),
            nn.Linear(len(middle), len(up), bias=bias, **like),
        ]
    else:
        how = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        parts = [
            nn.Conv2d(down.shape[1], len(down), 1, bias=False, **like),
            nn.Conv2d(
                len(down),
                len(middle),
                module.kernel_size,
                padding_mode=module.padding_mode,
                bias=False,
                **how,
                **like,
            ),
            nn.Conv2d(len(middle), len(up), 1, bias=bias, **like),
        ]
    for part, values in zip(parts, (down, middle, up), strict=True):
        part.weight.copy_(values.reshape(part.weight.shape))
    if bias:
        parts[2].bias.copy_(module.bias)
    return nn.Sequential(*parts).train(module.training)

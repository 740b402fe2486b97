"""Sparse weights that no kernel serves: each has its line in the plan."""

from __future__ import annotations

from torch import nn

from prunus.runtime.plan import DENSE, Row

_OTHERS = (
    nn.Bilinear,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)


def unserved(model: nn.Module, minimum: float) -> list[Row]:
    """Rows of the weights, `minimum` sparse or more, of layers that there is no kernel for."""
    rows, seen = [], set[int]()
    for path, module in model.named_modules():
        kind = type(module).__name__
        if not (isinstance(module, _OTHERS) or (kind == "Conv1D" and hasattr(module, "nf"))):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or "weight" not in name or weight.is_meta or not weight.numel():
                continue
            sparsity = 1.0 - int(weight.count_nonzero()) / weight.numel()
            if id(weight) in seen or sparsity < minimum:
                continue
            seen.add(id(weight))
            place = path if name == "weight" else f"{path}.{name}".removeprefix(".")
            reason = f"there is no sparse kernel for {kind}"
            rows.append(Row(place, kind, tuple(weight.shape), sparsity, DENSE, reason))
    return rows

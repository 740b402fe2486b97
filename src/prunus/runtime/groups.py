"""Linear layers in groups of outputs that share their columns: vector(V, 1), blocks, n:m."""

from __future__ import annotations

import torch
from torch import nn

from prunus import kernels
from prunus.errors import ShapeError
from prunus.kernels import Grouping
from prunus.runtime.modules import SparseLinear

WORDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def grouping_of(module: nn.Module) -> Grouping | None:
    """How a layer falls into groups, from its zeros; None: it does not, or is no Linear."""
    if not isinstance(module, nn.Linear):
        return None
    return kernels.grouping(module.weight.detach().float().numpy())


def grouped_layer(
    module: nn.Module, dtype: torch.dtype = torch.float32, groups: Grouping | None = None
) -> SparseLinear:
    """The packed twin of an nn.Linear in groups, values in float32, bfloat16 or int8.

    A stored column is multiplied for all outputs of its group: where vectors hold zeros, NaN or
    infinity in an input reaches all of them. groups: default, as found. ShapeError: there are none.
    """
    groups = grouping_of(module) if groups is None else groups
    if groups is None or not isinstance(module, nn.Linear):
        raise ShapeError(
            f"the weight of this {type(module).__name__} has no "
            f"groups of outputs that share columns; use SparseLinear.from_dense"
        )
    weight = module.weight.detach().to("cpu", torch.float32).contiguous().numpy()
    blob = kernels.pack_vectors(weight, groups.height, WORDS[dtype], groups.order)
    bias = None if module.bias is None else module.bias.detach().to("cpu", torch.float32)
    return SparseLinear(torch.from_numpy(blob), bias).standing_for(module)

"""Linear layers whose rows keep few of any 16 neighbouring columns: 2:4, 1:4, 4:8 and the like."""

from __future__ import annotations

import torch
from torch import nn

from prunus import kernels
from prunus.errors import ShapeError
from prunus.kernels.nm import MOST_SLOTS
from prunus.runtime.groups import WORDS
from prunus.runtime.modules import SparseLinear

FULL = 0.75
"""Share of non-zeros in the slots below which multiplying the empty ones cannot pay."""


def suits_nm(module: nn.Module) -> bool:
    """Whether a layer's zeros are regular enough; n:m itself always is, up to half of the weights.

    Structures whose group does not divide 16 columns (2:3 for instance) count as what their windows
    of 16 hold.
    """
    if not isinstance(module, nn.Linear):
        return False
    most, full = kernels.window_slots(module.weight.detach().float().numpy())
    return 0 < most <= MOST_SLOTS and full >= FULL


def nm_layer(module: nn.Module, dtype: torch.dtype = torch.float32) -> SparseLinear:
    """The packed twin of an nn.Linear in n:m form, values in float32 or bfloat16.

    Only stored weights contribute, as everywhere but in groups. ShapeError: a row keeps more than
    8 of 16 neighbouring columns.
    """
    if not isinstance(module, nn.Linear):
        raise ShapeError(f"{type(module).__name__} has no n:m form; use SparseLinear.from_dense")
    weight = module.weight.detach().to("cpu", torch.float32).contiguous().numpy()
    bias = None if module.bias is None else module.bias.detach().to("cpu", torch.float32)
    blob = torch.from_numpy(kernels.pack_nm(weight, WORDS[dtype]))
    return SparseLinear(blob, bias).standing_for(module)

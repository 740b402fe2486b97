"""torch's fast path of nn.TransformerEncoderLayer, which reads weights past their layers.

It would unpack a packed weight at every call. A layer that holds one goes the ordinary way; one
that does not keeps it.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from prunus import encoders
from prunus.runtime.verify import difference


def left(model: nn.Module, example: Any) -> nn.Module:
    """A copy whose encoder layers leave the fast path; the model where that changes its outputs."""
    if not any(type(m) is nn.TransformerEncoderLayer for m in model.modules()):
        return model
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    changed = [encoders.slow(m) for m in made.modules() if type(m) is nn.TransformerEncoderLayer]
    return made if any(changed) and difference(model, made, example) is None else model


def taken(model: nn.Module) -> nn.Module:
    """The model, changed: encoder layers of dense layers only take the fast path again."""
    for layer in model.modules():
        if type(layer) is nn.TransformerEncoderLayer and encoders.dense(layer):
            encoders.fast(layer)
    return model

"""torch's fast path of nn.TransformerEncoderLayer, which reads weights past their layers.

It would unpack a packed weight at every call. A layer that holds one goes the ordinary way; one
that does not keeps it.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from prunus.runtime.verify import difference

SWITCH, HELD = "activation_relu_or_gelu", "prunus_fast_path"


def left(model: nn.Module, example: Any) -> nn.Module:
    """A copy whose encoder layers leave the fast path; the model where that changes its outputs."""
    fast = [m for m in model.modules() if type(m) is nn.TransformerEncoderLayer and _switch(m)]
    if not fast:
        return model
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for layer in made.modules():
        if type(layer) is nn.TransformerEncoderLayer and _switch(layer):
            vars(layer)[HELD] = _switch(layer)
            vars(layer)[SWITCH] = 0
    return made if difference(model, made, example) is None else model


def taken(model: nn.Module) -> nn.Module:
    """The model, changed: encoder layers of dense layers only take the fast path again."""
    for layer in model.modules():
        if HELD in vars(layer) and all(
            type(m) is nn.Linear for m in (layer.linear1, layer.linear2)
        ):
            vars(layer)[SWITCH] = vars(layer).pop(HELD)
    return model


def _switch(layer: nn.Module) -> int:
    return int(vars(layer).get(SWITCH, 0))

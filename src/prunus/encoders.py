"""torch's fast paths of transformer encoders, which read weights past the layers that hold them."""

from __future__ import annotations

from torch import nn

_SWITCHES = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
             (nn.TransformerEncoder, "use_nested_tensor", False))  # fmt: skip
_HELD = "prunus_fast_path"


def slow(module: nn.Module) -> bool:
    """Keep an encoder (layer) off its fast path; tell whether there was anything to change.

    Outputs agree with the fast path's but for rounding, and for padded places, which nested
    tensors leave at zero.
    """
    for kind, name, off in _SWITCHES:
        held = vars(module).get(name, off)
        if isinstance(module, kind) and held:
            vars(module)[_HELD] = held
            vars(module)[name] = off
            return True
    return False


def fast(module: nn.Module) -> None:
    """Undo `slow`."""
    for kind, name, _ in _SWITCHES:
        if isinstance(module, kind) and _HELD in vars(module):
            vars(module)[name] = vars(module).pop(_HELD)


def dense(module: nn.Module) -> bool:
    """Tell whether the fast path finds in all encoder layers below what it reads."""
    layers = [m for m in module.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    read = [getattr(layer, name, None) for layer in layers for name in ("linear1", "linear2")]
    return all(m is None or type(m) is nn.Linear for m in read)

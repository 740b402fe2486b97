"""Which layers of a model could run sparse, what their inputs look like, and why others cannot."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import ShapeError
from prunus.runtime.conv1d import SparseConv1d
from prunus.runtime.modules import SparseConv2d, SparseLinear
from prunus.runtime.plan import Layer

KINDS = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}

DIRECT_CHANNELS = 4
"""Channels per group up to which a dense convolution is tried through the packed kernels."""


@dataclasses.dataclass(frozen=True)
class Call:
    """What one input of a layer looked like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def sample(self) -> Tensor:
        """A random tensor of this shape and, where elements do not overlap, these strides."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(self.shape, generator=generator, device="cpu")
        overlapping = any(
            stride == 0 and size > 1 for size, stride in zip(self.shape, self.stride, strict=True)
        )
        if overlapping:
            return values
        strided = torch.empty_strided(self.shape, self.stride, device="cpu")
        return strided.copy_(values)


Calls = Mapping[str, "collections.Counter[Call]"]


def run(model: nn.Module, example: Any) -> Any:
    """Call the model on a tensor, a tuple of positional or a mapping of named inputs."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """{first name: module} of every linear layer, 1-d and 2-d convolution, subclasses too."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, tuple(KINDS))
    }


def is_direct(module: nn.Module) -> bool:
    """Whether the packed kernels may beat torch on a dense layer: convolutions of few channels."""
    few = (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and module.in_channels // module.groups <= DIRECT_CHANNELS
    )
    return few and type(module) in KINDS


def kind_of(module: nn.Module) -> str:
    """The word for a layer in plans."""
    return next(kind for parent, kind in KINDS.items() if isinstance(module, parent))


def record(model: nn.Module, example: Any) -> Calls:
    """{layer name: counted calls} of one forward pass."""
    calls: dict[str, collections.Counter[Call]] = {}
    handles = []
    for name, module in layers_of(model).items():
        counter = calls.setdefault(name, collections.Counter())
        handles.append(module.register_forward_pre_hook(_recorder(counter), with_kwargs=True))
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _recorder(counter: collections.Counter[Call]):
    """A pre-hook that counts what comes in."""

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named.get("input")
        if isinstance(x, Tensor):
            counter[Call(tuple(x.shape), tuple(x.stride()), x.dtype)] += 1

    return hook


def layer_of(name: str, module: nn.Module) -> Layer:
    """The facts about a layer that a choice may look at."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ShapeError(f"layer {name!r} has no weight tensor")
    kept = int(weight.count_nonzero()) if weight.device.type != "meta" else weight.numel()
    sparsity = 1.0 - kept / weight.numel() if weight.numel() else 0.0
    return Layer(name, kind_of(module), tuple(weight.shape), sparsity, kept)


def tied_owners(model: nn.Module) -> dict[int, list[str]]:
    """{id(parameter): names of the modules that own it}."""
    owners: dict[int, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name or "(model)")
    return owners


def refusal(module: nn.Module, owners: Mapping[int, list[str]], calls: Mapping[Call, int]) -> str:
    """Why a layer must stay dense; "" if it may run sparse."""
    weight = module._parameters.get("weight")
    reason = ""
    if type(module) not in KINDS:
        reason = f"{type(module).__name__} is not exactly {_plain(module)}"
    elif weight is None:
        reason = "its weight is computed from other parameters"
    elif "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        reason = "it has forward hooks of its own"
    elif weight.device.type != "cpu" or weight.dtype != torch.float32:
        reason = f"its weight is {weight.dtype} on {weight.device}, kernels take float32 on the CPU"
    elif len(owners.get(id(weight), ())) > 1:
        reason = f"its weight is shared by {', '.join(owners[id(weight)])}"
    elif weight.numel() == 0:
        reason = "its weight is empty"
    elif not calls:
        reason = "the example never reached it"
    elif any(call.dtype != torch.float32 for call in calls):
        reason = f"its input is {next(c.dtype for c in calls if c.dtype != torch.float32)}"
    return reason


def _plain(module: nn.Module) -> str:
    """The torch class that a subclass extends."""
    return next(f"nn.{kind.__name__}" for kind in KINDS if isinstance(module, kind))


def pack_layer(module: nn.Module) -> SparseLinear | SparseConv1d | SparseConv2d:
    """The sparse twin of a layer."""
    if isinstance(module, nn.Conv1d):
        return SparseConv1d.from_dense(module)
    if isinstance(module, nn.Conv2d):
        return SparseConv2d.from_dense(module)
    if isinstance(module, nn.Linear):
        return SparseLinear.from_dense(module)
    raise ShapeError(f"{type(module).__name__} has no sparse twin")

"""Layers and what follows them directly: batch norms to fold in, activations to fuse."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn

from prunus.runtime.candidates import KINDS, WIDENED, Call, Calls, first_of
from prunus.runtime.tracing import UNTRACEABLE, Tracer, quietly


@dataclasses.dataclass(frozen=True)
class Chain:
    """Names of a layer, of the batch norm that alone sees its output, and of the activation."""

    layer: str
    norm: str = ""
    activation: str = ""


def chains(model: nn.Module, example: Any, calls: Calls) -> list[Chain]:
    """Every layer called once in each example and followed by a batch norm, an activation or both.

    From a torch.fx trace, or where that fails from neighbours in nn.Sequential. The model is run on
    proxies, so give a copy whose buffers may change. calls: of `candidates.record`.
    """
    follows = _traced(model, example)
    follows = dict(_neighbours(model)) if follows is None else follows
    found = []
    examples = len(example) if isinstance(example, list) else 1
    for name, module in model.named_modules():
        once = sum(calls.get(name, Counter()).values()) == examples
        if not (once and type(module) in KINDS and plain(module)):
            continue
        norm = follows.get(name, "")
        if norm and not _foldable(module, model.get_submodule(norm), calls[name]):
            norm = ""
        last = follows.get(norm or name, "")
        if last and not activation_name(model.get_submodule(last)):
            last = ""
        if norm or last:
            found.append(Chain(name, norm, last))
    return found


def activation_name(module: nn.Module) -> str:
    """The name in kernels.ACTIVATIONS of an activation that can be fused; "" for any other."""
    if not plain(module):
        return ""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate, "")
    return {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}.get(type(module), "")


def folded(found: list[Chain], model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} to put in place of layers and batch norms that become one.

    w' = w·s and b' = (b - mean)·s + beta with s = gamma / sqrt(variance + eps), in float64.
    """
    swapped: dict[str, nn.Module] = {}
    for chain in found:
        if not chain.norm:
            continue
        layer = model.get_submodule(chain.layer)
        scale, shift = _affine(cast(nn.BatchNorm2d, model.get_submodule(chain.norm)))
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        shift = shift if bias is None else shift + bias.double() * scale
        twin = copy.copy(layer)
        wide = scale.reshape(-1, *[1] * (weight.dim() - 1))
        twin._parameters = {
            "weight": _parameter(weight.double() * wide, weight),
            "bias": _parameter(shift, weight),
        }
        swapped |= {chain.layer: twin, chain.norm: nn.Identity()}
    return swapped


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm in eval mode, float64."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = (variance.double() + norm.eps).rsqrt()
    scale = scale * norm.weight.double() if norm.affine else scale
    shift = -mean.double() * scale
    return scale, shift + norm.bias.double() if norm.affine else shift


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.dtype), requires_grad=False)


def plain(module: nn.Module) -> bool:
    """No hooks, and the forward pass of its class."""
    return not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


def _foldable(layer: nn.Module, norm: nn.Module, calls: Mapping[Call, int]) -> bool:
    """Whether the batch norm scales each output of the layer; calls: the layer's."""
    kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
    weight = layer._parameters.get("weight")
    if type(norm) is not kind or weight is None or not plain(norm):
        return False
    dims = 2 if isinstance(layer, nn.Linear) else weight.dim()
    if any(len(call.shape) != dims for call in calls):
        return False
    values = [*layer._parameters.values(), *norm._parameters.values(), *norm._buffers.values()]
    same = all(v is None or v.device == weight.device for v in values)
    return same and norm.running_mean is not None and weight.dtype in WIDENED


def _traced(model: nn.Module, example: Any) -> dict[str, str] | None:
    """{module: module that alone gets its output}, both called once; None if tracing fails."""
    try:
        defaults = _defaults(model, example)
    except UNTRACEABLE:
        return None
    graph = quietly(Tracer(), model, defaults)
    if graph is None:
        return None
    nodes = list(graph.nodes)
    modules = dict(model.named_modules(remove_duplicate=False))
    count = Counter(id(modules[n.target]) for n in nodes if n.op == "call_module")
    read = {n.target.rpartition(".")[0] for n in nodes if n.op == "get_attr"}
    names = {id(module): name for name, module in model.named_modules()}

    def name_of(node: fx.Node) -> str:
        """The module's first name if the node is its only use, else ""."""
        if node.op != "call_module" or node.target in read:
            return ""
        module = modules[str(node.target)]
        return names[id(module)] if count[id(module)] == 1 else ""

    follows = {}
    for node in nodes:
        if len(node.users) == 1 and name_of(node):
            (user,) = node.users
            if name_of(user) and user.args == (node,) and not user.kwargs:
                follows[name_of(node)] = name_of(user)
    return follows


def _defaults(model: nn.Module, example: Any) -> dict[str, Any]:
    """Arguments of forward that the example leaves at their defaults."""
    signature = inspect.signature(model.forward)
    example = first_of(example)
    if isinstance(example, Mapping):
        bound = signature.bind(**example)
    else:
        bound = signature.bind(*(example if isinstance(example, tuple) else (example,)))
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in bound.arguments and parameter.default is not parameter.empty
    }


def _neighbours(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, name of the next) in every nn.Sequential, where either has this one place only."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for prefix, parent in model.named_modules():
        if type(parent) is not nn.Sequential or not plain(parent) or places[id(parent)] != 1:
            continue
        children = list(parent._modules.items())
        for (name, one), (other, two) in itertools.pairwise(children):
            if one is not None and two is not None and places[id(one)] == places[id(two)] == 1:
                start = f"{prefix}." if prefix else ""
                yield f"{start}{name}", f"{start}{other}"

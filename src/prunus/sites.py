"""Find what can be pruned in a model, under names that survive DDP and torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from prunus.core import Site
from prunus.errors import SiteError

Patterns = str | Sequence[str] | None

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module below torch.compile, DataParallel and DDP."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _weights_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of one module that are matrix products with its input."""
    if isinstance(module, (nn.Linear, nn.Bilinear, *_CONVOLUTIONS)):
        names = ["weight"]
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        names = [n for n, _ in module.named_parameters(recurse=False) if "weight" in n]
    elif type(module).__name__ == "Conv1D":  # the transposed Linear of transformers' GPT-2
        names = ["weight"]
    else:
        names = []
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, nn.Parameter) and value.ndim >= 2:
            yield value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module into eval mode and back into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a name matches a pattern: shell wildcards, or a module prefix of the name."""
    return any(fnmatchcase(name, p) or name.startswith(p + ".") for p in patterns)


def _as_list(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def named(patterns: Patterns) -> bool:
    """Tell whether there is any pattern."""
    return bool(_as_list(patterns))


def find(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> tuple[Site, ...]:
    """List the prunable weights of a model in the order of `named_parameters()`.

    Weights of linear, convolution, recurrent and attention layers; not embeddings, norms, biases.
    A tensor that has several names (tied weights) is one site. include, exclude: names, prefixes
    or shell patterns such as "encoder.*.weight"; `include` may name any parameter of two or more
    dimensions. Raises SiteError if a pattern matches nothing or if nothing is left.
    """
    model = unwrap(model)
    wanted, unwanted = _as_list(include), _as_list(exclude)
    names: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    prunable, transposed = set(), set()
    for module in model.modules():
        found = {id(weight) for weight in _weights_of(module)}
        prunable |= found
        if isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D":
            transposed |= found
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise SiteError(f"{name!r} has no shape yet: run the model once before pruning it")
        if parameter.ndim >= 2 and (wanted or id(parameter) in prunable):
            names.setdefault(id(parameter), []).append(name)
            shapes[id(parameter)] = tuple(parameter.shape)
    computed = _computed(model)
    for pattern in wanted + unwanted:
        held = [n for group in names.values() for n in group]
        if not any(matches(n, [pattern]) for n in held + computed * (pattern in unwanted)):
            known = ", ".join(group[0] for group in names.values()) or "none"
            raise SiteError(f"pattern {pattern!r} matches no prunable weight; there are: {known}")
    sites = [
        Site(group[0], shapes[key], tuple(group[1:]), transposed=key in transposed)
        for key, group in names.items()
        if (not wanted or any(matches(n, wanted) for n in group))
        and not any(matches(n, unwanted) for n in group)
    ]
    meant = [n for n in computed if not wanted or matches(n, wanted)]
    _warn_of_computed([n for n in meant if not matches(n, unwanted)])
    if not sites:
        masked = any(name.endswith("_orig") for name, _ in model.named_parameters())
        raise SiteError(
            f"{type(model).__name__} has no prunable weight left; "
            + (
                "torch.nn.utils.prune has put its own masks on it: call prune.remove on each first"
                if masked
                else "prunable are the weights of linear, convolution, recurrent and attention "
                "layers"
            )
        )
    return tuple(sites)


def _computed(model: nn.Module) -> list[str]:
    """Names of weights of linear and convolution layers that are no parameters of their own."""
    return [
        f"{name}.weight".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Bilinear, *_CONVOLUTIONS))
        and "weight" not in module._parameters
    ]


def _warn_of_computed(names: list[str]) -> None:
    """One warning for layers that were meant but cannot be pruned."""
    if names:
        warnings.warn(
            f"{', '.join(names)} cannot be pruned: computed from other parameters (weight_norm, "
            f"parametrize, torch.nn.utils.prune). Remove that first (parametrize."
            f"remove_parametrizations, prune.remove), or name them in exclude=",
            UserWarning,
            stacklevel=3,
        )


def parameters(model: nn.Module, sites: Iterable[Site]) -> dict[str, nn.Parameter]:
    """Return {site name: its live parameter}."""
    model = unwrap(model)
    return {site.name: model.get_parameter(site.name) for site in sites}


def weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Return {site name: detached weight}, sharing memory with the parameters.

    Raises SiteError for weights without data.
    """
    empty = [name for name, parameter in parameters.items() if parameter.is_meta]
    if empty:
        raise SiteError(
            f"{', '.join(empty)} have no data yet (meta device): load weights first, or call "
            f"model.to_empty(device='cpu') and initialise them"
        )
    return {name: parameter.detach() for name, parameter in parameters.items()}


def biases_of(model: nn.Module, weight: nn.Parameter) -> list[nn.Parameter]:
    """Return the biases of the layers that hold a weight, under all its names."""
    found: dict[int, nn.Parameter] = {}
    for module in unwrap(model).modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, parameter in own.items():
            bias = own.get(name.replace("weight", "bias"))
            if parameter is weight and bias is not None and bias is not weight:
                found[id(bias)] = bias
    return list(found.values())


def with_unit(site: Site, unit: int, rows: int = 1) -> Site:
    """Return the site with its unit size and its rows set, as a structure prescribes."""
    return replace(site, unit=unit, rows=rows)


def turned(site: Site, tensor: torch.Tensor) -> torch.Tensor:
    """Put outputs on axis 0 and inputs on axis 1, or back; structures see weights this way."""
    return tensor.transpose(0, 1).contiguous() if site.transposed else tensor


def turned_shape(site: Site) -> tuple[int, ...]:
    """Return the shape with outputs on axis 0 and inputs on axis 1."""
    return (site.shape[1], site.shape[0], *site.shape[2:]) if site.transposed else site.shape

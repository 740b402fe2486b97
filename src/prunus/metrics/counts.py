"""Parameters and nonzeros of a model or of a mapping of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from prunus.errors import ShapeError


class SiteCount(NamedTuple):
    """One tensor: its dense shape, its size, and how many entries are not zero."""

    shape: tuple[int, ...]
    parameters: int
    nonzeros: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, 0 for an empty tensor."""
        return 1.0 - self.nonzeros / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Counts:
    """Totals over unique tensors and the table they were summed from."""

    parameters: int
    nonzeros: int
    sites: Mapping[str, SiteCount]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all counted tensors, 0 if there are none."""
        return 1.0 - self.nonzeros / self.parameters if self.parameters else 0.0


def counts(model: nn.Module) -> Counts:
    """Count parameters; tied ones once, under the first name; buffers not at all.

    A submodule that offers `sparse_counts() -> {parameter name: (dense shape, nonzeros)}` is
    believed: what it lists counts as a parameter of that shape.
    Raises ShapeError for parameters without data (lazy or on the meta device).
    """
    return _total(dict(_sites(model)))


def counts_of_tensors(tensors: Mapping[str, torch.Tensor]) -> Counts:
    """Count every floating or complex tensor of a state dict; views of one memory count once."""
    sites: dict[str, SiteCount] = {}
    for name, tensor in unique_tensors(tensors):
        if tensor.is_floating_point() or tensor.is_complex():
            sites[name] = _count(name, tensor)
    return _total(sites)


def unique_tensors(tensors: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a mapping, leaving out repeats of the same view of the same memory."""
    seen: set[tuple[object, ...]] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        # A state dict holds detached tensors, so tied ones are told by their memory, not by `is`.
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and tensor.data_ptr() and key in seen:
            continue
        seen.add(key)
        yield name, tensor


def _sites(model: nn.Module) -> Iterator[tuple[str, SiteCount]]:
    """Walk modules in order; reported sparse tensors replace parameters of the same name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        report: Any = getattr(module, "sparse_counts", None)
        reported: dict[str, tuple[tuple[int, ...], int]] = dict(report()) if report else {}
        for name, (shape, nonzeros) in reported.items():
            shape = tuple(int(size) for size in shape)
            yield dot + name, SiteCount(shape, _product(shape), int(nonzeros))
        for name, parameter in module.named_parameters(recurse=False):
            if name in reported or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield dot + name, _count(dot + name, parameter)


def _count(name: str, tensor: torch.Tensor) -> SiteCount:
    lazy = isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
    if lazy or tensor.is_meta:
        raise ShapeError(
            f"{name}: the tensor has no data yet ({'lazy' if lazy else 'meta device'}); "
            "run one forward pass or load weights before counting"
        )
    values = tensor.detach()
    return SiteCount(tuple(values.shape), values.numel(), int(torch.count_nonzero(values)))


def _total(sites: dict[str, SiteCount]) -> Counts:
    return Counts(
        parameters=sum(site.parameters for site in sites.values()),
        nonzeros=sum(site.nonzeros for site in sites.values()),
        sites=MappingProxyType(sites),
    )


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size

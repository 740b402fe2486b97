"""Modules of nothing but packed convolutions, run by one call of the kernels.

Between the convolutions values keep the kernels' layout, and nothing returns to Python. The layers
stay where they are, with their names, buffers and state: only the forward pass of the module around
them changes, and falls back to the old one wherever that may differ (hooks, tracers, gradients,
other dtypes, layers that were exchanged).
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_modules

from prunus import kernels
from prunus.errors import PrunusError, ShapeError
from prunus.kernels import INPUT, Step
from prunus.runtime.forward import Forward, Shortcut
from prunus.runtime.modules import SparseConv2d
from prunus.runtime.ops import kept_geometry
from prunus.runtime.weight import observed


@dataclasses.dataclass(frozen=True)
class Link:
    """One layer of a network, by its path, and the numbers of the links it reads and adds."""

    path: str
    source: int
    residual: int | None


class Network(Shortcut):
    """The forward pass of a module that only calls packed convolutions, in one call."""

    def __init__(
        self, links: tuple[Link, ...], inside: tuple[str, ...], before: Forward | None = None
    ) -> None:
        """links: in the order of their calls. inside: `contents` of the module.

        before: the forward pass that the module has instead of its class's.
        """
        super().__init__(before)
        self.links, self.inside = links, inside

    def attempt(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The output where nothing but images come in, and nobody watches."""
        return None if len(args) != 1 or named or observed() else self.run(module, args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return Network, (self.links, self.inside, self.before)

    def run(self, module: nn.Module, x: Any) -> Tensor | None:
        """The output for fp32 images on the CPU; None for what the layers have to judge."""
        if type(x) is not Tensor or x.dtype != torch.float32 or x.dim() != 4:
            return None
        if not x.is_cpu or x.is_neg():
            return None
        held = _HELD.get(module)
        if held is None:
            held = _HELD[module] = _Held(self, module)
        tensors = held.tensors()
        if tensors is None or not x.numel():
            return None
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, *tensors)
        ):
            return None
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        laid = held.table(x.shape[1:], pointers)
        return None if laid is None else laid.call(x.contiguous())


def contents(module: nn.Module) -> tuple[str, ...]:
    """Paths, classes and activations of all modules inside: what a network was traced with."""
    return tuple(
        f"{path}: {type(child).__qualname__} {getattr(child, 'activation', '')}"
        for path, child in module.named_modules()
        if path
    )


class _Table:
    """The rows that the kernels take for images of one size."""

    def __init__(
        self, laid: kernels.Arrangement, shape: tuple[int, ...], pointers: list[int], rows: Any
    ) -> None:
        self.rows, self.shape, self.pointers = rows, shape, pointers
        self.address = rows.__array_interface__["data"][0]
        self.sizes = (laid.floats_in, laid.floats_out, laid.floats)

    def call(self, x: Tensor) -> Tensor:
        """Contiguous images to a new tensor."""
        y = x.new_empty((len(x), *self.shape))
        threads = torch.get_num_threads()
        kernels.network_ptr(
            self.address, len(self.rows), len(x), x.data_ptr(), y.data_ptr(), *self.sizes, threads
        )
        return y


class _Held:
    """What a network needs of one module, to see at every call whether it is still the same.

    Flat lists of dicts and keys: this is looked through in every call.
    """

    def __init__(self, network: Network, module: nn.Module) -> None:
        self.links = network.links
        self.sound = contents(module) == network.inside
        inside = [child for path, child in module.named_modules() if path]
        places = [
            (parent._modules, name) for parent in module.modules() for name in parent._modules
        ]
        self.parents, self.names = [held for held, _ in places], [name for _, name in places]
        self.children = list(map(dict.get, self.parents, self.names))
        self.hooks: list[Any] = [child._forward_hooks for child in inside]
        self.hooks += [child._forward_pre_hooks for child in inside]
        self.hooks += [globals_of_modules._global_forward_hooks]
        self.hooks += [globals_of_modules._global_forward_pre_hooks]
        self.layers: list[SparseConv2d] = []
        if self.sound:
            self.layers = [cast(SparseConv2d, module.get_submodule(n.path)) for n in self.links]
        self.buffers = [layer._buffers for layer in self.layers] * 2
        self.leaves = ["packed"] * len(self.layers) + ["bias"] * len(self.layers)
        self.tables: dict[Any, _Table] = {}

    def tensors(self) -> list[Tensor | None] | None:
        """The buffers of all layers; None unless the network is what was traced."""
        if not self.sound or any(self.hooks):
            return None
        # Compares by identity first, and modules do not define equality.
        if list(map(dict.get, self.parents, self.names)) != self.children:
            return None
        return list(map(dict.get, self.buffers, self.leaves))

    def table(self, shape: torch.Size, pointers: list[int]) -> _Table | None:
        """The table for images [C, H, W]; None where a layer would refuse them."""
        found = self.tables.get(shape)
        if found is None or found.pointers != pointers:
            if len(self.tables) >= 64:
                self.tables.clear()
            found = self._table(shape, pointers)
            if found is not None:
                self.tables[shape] = found
        return found

    def _table(self, shape: torch.Size, pointers: list[int]) -> _Table | None:
        if not all(_plain_buffers(layer) for layer in self.layers):
            return None
        try:
            steps = self._steps((shape[0], shape[1], shape[2]))
            laid = kernels.arrange(steps)
        except PrunusError:
            return None  # the layers say why
        rows = laid.rows.copy()
        rows[:, 0], rows[:, 1] = pointers[: len(steps)], pointers[len(steps) :]
        out = (steps[-1].rows, *steps[-1].geometry.out_size)
        return _Table(laid, out, pointers, np.ascontiguousarray(rows))

    def _steps(self, shape: tuple[int, int, int]) -> list[Step]:
        shapes, steps = {INPUT: shape}, []
        for number, (link, layer) in enumerate(zip(self.links, self.layers, strict=True)):
            if shapes[link.source][0] != layer.in_channels:
                raise ShapeError(f"{link.path} gets {shapes[link.source][0]} channels")
            (top, bottom), (left, right) = layer._margins()
            geometry = kept_geometry(
                (1, *shapes[link.source]),
                layer.kernel_size,
                layer.stride,
                (top, bottom, left, right),
                layer.dilation,
                layer.groups,
            )
            rows = layer.out_channels
            steps.append(Step(geometry, rows, link.source, link.residual, layer.activation))
            shapes[number] = (rows, *geometry.out_size)
        return steps


_HELD: weakref.WeakKeyDictionary[nn.Module, _Held] = weakref.WeakKeyDictionary()


def _plain_buffers(layer: SparseConv2d) -> bool:
    packed, bias = layer.packed, layer.bias
    plain = packed.is_cpu and packed.dtype == torch.uint8
    return plain and (
        bias is None or (bias.is_cpu and bias.dtype == torch.float32 and bias.is_contiguous())
    )

"""Floating-point operations of one forward pass, dense and with zeros skipped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prunus.sites import evaluating


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass; `modules[name]` is (dense, sparse) of that module alone."""

    dense: int
    sparse: float
    modules: Mapping[str, tuple[int, float]]


def flops(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> Flops:
    """Count the operations of `model(*inputs)` in eval mode: a multiply-add is 2.

    Counted: matrix products, convolutions and attention products, by the formulas of
    torch.utils.flop_counter; not counted: biases, activations, normalisation, embedding look-ups.
    sparse = dense times the fraction of nonzeros of the weight in each product; products of two
    activations stay dense, zeros in activations are not exploited. A module that offers
    `sparse_counts()` is counted from its reported weight shape [out, ...] and its output.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    tally = _Tally(model)
    with torch.no_grad(), evaluating(model), _decomposed(), tally.attached(), _Counter(tally):
        model(*arguments)
    modules = {name: (dense, sparse) for name, (dense, sparse) in tally.table.items() if dense}
    return Flops(
        dense=sum(dense for dense, _ in modules.values()),
        sparse=sum(sparse for _, sparse in modules.values()),
        modules=MappingProxyType(modules),
    )


@contextmanager
def _decomposed() -> Iterator[None]:
    """Switch off fused kernels that have no formula (attention fast paths, oneDNN recurrences)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            # flags() also writes the TF32 setting, about which builds without Intel GPUs warn.
            warnings.filterwarnings("ignore", message="TF32 acceleration", category=UserWarning)
            with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Tally:
    """Books operations on the innermost module that is running."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.table: dict[str, tuple[int, float]] = {}
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() > 1}
        self.stack: list[str] = [""]
        self.opaque = 0  # depth inside modules that report their own counts

    def add(self, dense: int, fraction: float) -> None:
        """Add dense operations, of which `fraction` meet a nonzero weight."""
        before = self.table.get(self.stack[-1], (0, 0.0))
        self.table[self.stack[-1]] = (before[0] + dense, before[1] + dense * fraction)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether the tensor is, or is a view of, a parameter of two or more dimensions."""
        return tensor.untyped_storage().data_ptr() in self.weights

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Follow which module is running through forward hooks, removed at the end."""
        handles = []
        for name, module in self.model.named_modules():
            sparse = callable(getattr(module, "sparse_counts", None))
            handles.append(module.register_forward_pre_hook(self._enter(name, sparse)))
            handles.append(module.register_forward_hook(self._leave(sparse)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, sparse: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            self.stack.append(name)
            self.opaque += sparse

        return hook

    def _leave(self, sparse: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if sparse:
                self._add_reported(module, output)
            self.opaque -= sparse
            self.stack.pop()

        return hook

    def _add_reported(self, module: Any, output: object) -> None:
        # Each output entry is one row of the weight times one input window.
        if self.opaque > 1 or not isinstance(output, Tensor):
            return
        for shape, nonzeros in module.sparse_counts().values():
            if len(shape) > 1 and prod(shape):
                self.add(2 * output.numel() * prod(shape[1:]), nonzeros / prod(shape))


class _Counter(TorchDispatchMode):
    """Sees every ATen call; counts those with a formula and decomposes the others."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and book it."""
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet not in flop_registry:
            if hasattr(func, "decompose"):
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not self.tally.opaque:
            dense = int(flop_registry[packet](*args, **kwargs, out_val=result))
            self.tally.add(dense, self._fraction(args))
        return result

    def _fraction(self, args: tuple[Any, ...]) -> float:
        """Fraction of nonzeros of the weights among the operands (of their product, if several)."""
        fraction = 1.0
        for operand in args:
            if isinstance(operand, Tensor) and operand.numel() and self.tally.is_weight(operand):
                fraction *= int(torch.count_nonzero(operand)) / operand.numel()
        return fraction

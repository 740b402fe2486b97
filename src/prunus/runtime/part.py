"""One of several linear layers that read the same input and are computed as one."""

from __future__ import annotations

import functools
import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunus.errors import ShapeError
from prunus.runtime.attention import Redirect
from prunus.runtime.forward import copiers, empty, state_of
from prunus.runtime.modules import SparseLinear


class _Frame:
    """One call of the parent: the input that was multiplied last, and whose rows are waiting."""

    __slots__ = ("facts", "rows", "waiting", "x")

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.facts: tuple[Any, ...] = ()
        self.rows: list[Tensor | None] = []
        self.waiting = 0

    def take(
        self, number: int, x: Tensor, facts: tuple[Any, ...], merged: SparseLinear, sizes: list[int]
    ) -> Tensor:
        """The rows of one part; computed for all parts unless they are waiting for this input."""
        found = self.rows[number] if self.x is x and self.facts == facts else None
        if found is None:
            self.rows = list(merged(x).split(sizes, -1))
            self.x, self.facts, self.waiting = x, facts, len(sizes)
            found = self.rows[number]
        self.rows[number] = None  # whoever asks again gets a product of his own
        self.waiting -= 1
        if not self.waiting:
            self.x = None
        return cast(Tensor, found)


def _facts(x: Tensor) -> tuple[Any, ...]:
    """What must be the same for two products of one tensor to be the same.

    An inference tensor counts no versions; see `Meeting`.
    """
    version = -1 if x.is_inference() else x._version
    return version, x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class _Calls(threading.local):
    """The running calls of a parent in this thread, innermost last."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []


class Meeting:
    """Where parts find what one of them computed for all: within one call of their parent only.

    Nothing is kept between calls, nor shared between threads; an input that was written to between
    two parts has another version and is multiplied again. Inference tensors have no version: there
    the parent must not write to the input between its parts, which is checked on the example.
    """

    def __init__(self) -> None:
        self.calls = _Calls()
        self.traced: list[_Frame] = []  # for torch.compile and export, which follow plain lists

    def frames(self) -> list[_Frame]:
        """The running calls of the parent, innermost last."""
        return self.traced if torch.compiler.is_compiling() else self.calls.frames

    def __reduce__(self) -> tuple[Any, ...]:
        return Meeting, ()


class LinearPart(nn.Module):
    """Rows `start` to `stop` of a merged SparseLinear, in place of the layer they came from.

    The first part holds the merged layer as the submodule `merged`. Called in the forward pass of
    its parent, the first one called computes for all; anywhere else each computes everything and
    returns its rows. Outputs are views: next to each other in the last axis.
    """

    def __init__(
        self, elder: LinearPart | None, merged: SparseLinear, sizes: list[int], number: int
    ) -> None:
        super().__init__()
        if sum(sizes) != merged.out_features:
            raise ShapeError(f"parts of {sizes} rows do not make {merged.out_features}")
        self.meeting = Meeting() if elder is None else elder.meeting
        self.sizes, self.number = list(sizes), number
        self.start = sum(sizes[:number])
        self.in_features, self.out_features = merged.in_features, sizes[number]
        self.merged = merged if elder is None else None
        self._elder = () if elder is None else (elder,)  # a tuple: not a submodule of this one, too
        self.eval()

    @property
    def whole(self) -> SparseLinear:
        """The layer that all parts are of."""
        holder = self._elder[0] if self._elder else self
        return cast(SparseLinear, holder.merged)

    @property
    def weight(self) -> Tensor:
        """The dense weight of this part, unpacked anew at every access."""
        return self.whole.weight[self.start : self.start + self.out_features]

    @property
    def bias(self) -> Tensor | None:
        """The bias of this part."""
        bias = self.whole.bias
        return None if bias is None else bias[self.start : self.start + self.out_features]

    def forward(self, input: Tensor) -> Tensor:
        """As SparseLinear."""
        compiling = torch.compiler.is_compiling()
        frames = self.meeting.traced if compiling else self.meeting.calls.frames
        if not frames:
            return self.whole(input).narrow(-1, self.start, self.out_features)
        # Tracers see every write, but know no versions.
        facts = () if compiling else _facts(input)
        return frames[-1].take(self.number, input, facts, self.whole, self.sizes)

    def extra_repr(self) -> str:
        """Sizes and place."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, part {self.number + 1} of {len(self.sizes)}"


def split(merged: SparseLinear, sizes: list[int]) -> list[LinearPart]:
    """The parts of a merged layer; of these many rows each."""
    first = LinearPart(None, merged, sizes, 0)
    return [first, *(LinearPart(first, merged, sizes, i) for i in range(1, len(sizes)))]


def install(parent: nn.Module, part: LinearPart) -> None:
    """Let the parts in a parent share within each of its calls; its class gains a scope."""
    _open(parent)
    vars(parent)["prunus_meetings"] = (*vars(parent)["prunus_meetings"], part.meeting)


def redirect(module: nn.Module) -> None:
    """Let attention within each call of a module run through the kernel; its class gains a scope.

    Under torch.compile and export the scope has no such effect.
    """
    _open(module)
    vars(module)["prunus_redirects"] = True


def _open(parent: nn.Module) -> None:
    """Give a module the class with scopes, if it does not have it."""
    if "prunus_meetings" not in vars(parent):
        parent.__class__ = _scoped(type(parent))
        vars(parent)["prunus_meetings"], vars(parent)["prunus_redirects"] = (), False


@functools.cache
def _scoped(base: type[nn.Module]) -> type[nn.Module]:
    """The class `base` with a forward pass that opens and closes its scopes."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        if self.prunus_redirects and not torch.compiler.is_compiling():
            with Redirect():
                return met(self, args, named)
        return met(self, args, named)

    def met(self: Any, args: Any, named: Any) -> Any:
        opened = [meeting.frames() for meeting in self.prunus_meetings]
        for frames in opened:
            frames.append(_Frame())
        try:
            return base.forward(self, *args, **named)
        finally:
            for frames in opened:
                frames.pop()

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": lambda module, _: (_revived, (base,), state_of(module)),
        "forward": forward,
        **copiers(base),
    }
    return cast("type[nn.Module]", type(base.__name__, (base,), members))


def _revived(base: type[nn.Module]) -> nn.Module:
    """An empty instance, to be filled with its state."""
    return empty(_scoped(base))

"""One of several linear layers that read the same input and are computed as one."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunus.errors import ShapeError
from prunus.runtime.modules import SparseLinear


@dataclasses.dataclass
class _Frame:
    """One call of the parent: the input that was multiplied last, and whose rows are waiting."""

    x: Tensor | None = None
    facts: tuple[Any, ...] = ()
    rows: list[Tensor | None] = dataclasses.field(default_factory=list)

    def take(self, number: int, x: Tensor, merged: SparseLinear, sizes: list[int]) -> Tensor:
        """The rows of one part; computed for all parts unless they are waiting for this input."""
        facts = _facts(x)
        found = self.rows[number] if self.x is x and self.facts == facts else None
        if found is None:
            rows: list[Tensor | None] = list(merged(x).split(sizes, -1))
            self.x, self.facts, self.rows = x, facts, rows
            found = rows[number]
        self.rows[number] = None  # whoever asks again gets a product of his own
        if all(row is None for row in self.rows):
            self.x = None
        return cast(Tensor, found)


def _facts(x: Tensor) -> tuple[Any, ...]:
    """What must be the same for two products of one tensor to be the same.

    An inference tensor counts no versions; see `Meeting`.
    """
    if torch.compiler.is_compiling():
        return ()
    version = -1 if x.is_inference() else x._version
    return version, x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class Meeting:
    """Where parts find what one of them computed for all: within one call of their parent only.

    Nothing is kept between calls, nor shared between threads; an input that was written to between
    two parts has another version and is multiplied again. Inference tensors have no version: there
    the parent must not write to the input between its parts, which is checked on the example.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self.traced: list[_Frame] = []  # instead of the thread's own, which tracers cannot follow

    def _frames(self) -> list[_Frame]:
        """The calls of the parent that are running, innermost last."""
        if torch.compiler.is_compiling():
            return self.traced
        frames = getattr(self._local, "frames", None)
        if frames is None:
            frames = self._local.frames = []
        return frames

    def enter(self) -> None:
        """The parent begins."""
        self._frames().append(_Frame())

    def leave(self) -> None:
        """The parent ends, by an exception perhaps."""
        frames = self._frames()
        if frames:
            frames.pop()

    def frame(self) -> _Frame | None:
        """The call that is running in this thread, if there is one."""
        frames = self._frames()
        return frames[-1] if frames else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Meeting, ()


class Enter:
    """Forward pre-hook of the parent."""

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.meeting.enter()


class Leave(Enter):
    """Forward hook of the parent."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        self.meeting.leave()


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
        frame = self.meeting.frame()
        if frame is None:
            return self.whole(input).narrow(-1, self.start, self.out_features)
        return frame.take(self.number, input, self.whole, self.sizes)

    def extra_repr(self) -> str:
        """Sizes and place."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, part {self.number + 1} of {len(self.sizes)}"


def split(merged: SparseLinear, sizes: list[int]) -> list[LinearPart]:
    """The parts of a merged layer; of these many rows each."""
    first = LinearPart(None, merged, sizes, 0)
    return [first, *(LinearPart(first, merged, sizes, i) for i in range(1, len(sizes)))]


def install(parent: nn.Module, part: LinearPart) -> None:
    """Let the parts in a parent share within each of its calls."""
    parent.register_forward_pre_hook(Enter(part.meeting), prepend=True)
    parent.register_forward_hook(Leave(part.meeting), always_call=True)

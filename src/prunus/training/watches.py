"""What a driver sees of a layer's passes between two steps of its optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus.errors import NotFiniteError
from prunus.training.candidates import LargestGradients
from prunus.training.functions import Outer
from prunus.training.layers import SparseWeight


class Watch:
    """Looks at passes of a layer, and begins anew where the gradients of a step were thrown away.

    That is: where a pass comes after gradients were accumulated and cleared again, as after a step
    that a GradScaler skipped, or a backward pass for another purpose; and where the layer was given
    another topology. `bad`: whether a gradient was not finite.
    """

    def __init__(
        self, layer: SparseWeight, count: Callable[[SparseWeight], int], passes: int, together: bool
    ) -> None:
        """count(layer): places to find; passes: expected, 0: hold all; together: of all ranks."""
        self.layer, self.passes, self.together = layer, passes, together
        self._count = count
        self._handle = layer.values.register_post_accumulate_grad_hook(self._accumulated)
        self._begin()

    def _begin(self) -> None:
        count = self._count(self.layer)
        self.found = LargestGradients(self.layer.pattern, count, self.passes, self.together)
        self.bad = self._ended = False

    def _accumulated(self, parameter: Tensor) -> None:
        self._ended = True

    def remove(self) -> None:
        """Look no more."""
        self._handle.remove()

    def __call__(self, rows: Outer) -> None:
        """Look at one pass."""
        grad = self.layer.values.grad
        anew = self._ended and (grad is None or not bool(grad.any()))
        if anew or not self.fits:
            self._begin()
        self._ended = False
        self._guarded(lambda: self.found(rows))
        if self.passes != 1 and not all(bool(torch.isfinite(t).all()) for t in (rows.x, rows.y)):
            self.bad = True

    def _guarded(self, look: Callable[[], object]) -> None:
        try:
            look()
        except NotFiniteError:  # the step may be skipped for it
            self.bad = True

    @property
    def fits(self) -> bool:
        """Whether the layer still has the topology that was looked at."""
        return self.found.pattern is self.layer.pattern

    @property
    def complete(self) -> bool:
        """Whether all passes count; not if one was reduced before another came."""
        return self.found.complete

    @property
    def seen(self) -> int:
        """Passes since the last step."""
        return self.found.seen

    @property
    def wanted(self) -> int:
        """How many places are looked for."""
        return self.found.best.count

    def find(self) -> None:
        """Reduce what is held, if anything is."""
        self._guarded(self.found.find)

    def take(self, count: int) -> Tensor:
        """The best `count` places, ascending."""
        return self.found.find().take(count)

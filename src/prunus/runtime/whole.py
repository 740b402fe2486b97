"""The verdict on the whole model: which of its forms is fastest, and that none is slower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from prunus.runtime.assemble import in_channels_last
from prunus.runtime.decide import LAST, MARGIN, bound, channels_last
from prunus.runtime.dense import in_bfloat16
from prunus.runtime.measure import interleaved
from prunus.runtime.plan import DENSE, Plan
from prunus.runtime.tracing import UNTRACEABLE
from prunus.runtime.verify import BF16, difference, same_randomness

MODEL_BUDGET = 1.0
"""Seconds of measuring the whole model."""

EVEN = MARGIN
"""A bfloat16 form may take this many times as long: it halves the bytes of what is not packed."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to run the whole model: with the swaps of the plan or without, in which dtype, how."""

    swapped: bool
    half: bool = False
    last: bool = False
    merged: bool = False

    def __str__(self) -> str:
        """For instance "sparse bf16 channels_last"; the dense ones begin with "dense"."""
        kind = "sparse" if self.swapped else "dense"
        words = [kind, "merged" * self.merged, "bf16" * self.half, LAST * self.last]
        return " ".join(word for word in words if word)

    def of(self, model: nn.Module) -> nn.Module:
        """The model in this dtype and layout, a copy unless it is in both already."""
        model = in_bfloat16(model) if self.half else model
        return in_channels_last(model) if self.last else model


Build = Callable[[Form], nn.Module]
"""The model with the swaps of the plan, siblings merged or not, or without; fp32, contiguous."""


def whole(
    build: Build, example: Any, plan: Plan, *, swaps: bool, merges: bool, half: bool
) -> tuple[Plan, Form]:
    """The plan with the times of the whole, and the form to take.

    swaps: whether any layer runs in another way. merges: whether siblings may be merged; what reads
    their outputs may be slower on views, so that the whole decides. half: whether bfloat16 is
    allowed.
    """
    images = any(row.kind == "conv2d" for row in plan.rows)
    forms = [
        Form(swapped, narrow, last, merged)
        for swapped in ((False, True) if swaps else (False,))
        for merged in ((False, True) if merges and swapped else (False,))
        for narrow in ((False, True) if half else (False,))
        for last in ((False, True) if images else (False,))
    ]
    if len(forms) == 1:
        return plan, forms[0]
    models = {form: form.of(build(form)) for form in forms}
    if half:
        exact = build(Form(False))
        for form in [form for form in forms if form.half]:
            if not _close(exact, models[form], example):
                del models[form]  # bfloat16 is too coarse for this model, or mixes badly with fp32
    return judged(plan, _seconds(models, example))


def _close(exact: nn.Module, narrow: nn.Module, example: Any) -> bool:
    """Whether a model in bfloat16 runs, and gives about the same."""
    try:
        return difference(exact, narrow, example, BF16) is None
    except UNTRACEABLE:
        return False


def _seconds(models: Mapping[Form, nn.Module], example: Any) -> dict[Form, list[float]]:
    """Seconds of every form on every example."""
    examples = example if isinstance(example, list) else [example]
    runs = {
        (form, number): bound(model, channels_last(one) if form.last else one)
        for form, model in models.items()
        for number, one in enumerate(examples)
    }
    keys = {f"{form} {number}": (form, number) for form, number in runs}
    with same_randomness():
        found = interleaved(
            {name: runs[key] for name, key in keys.items()}, budget=MODEL_BUDGET * len(examples)
        )
    times: dict[Form, list[float]] = {form: [] for form in models}
    for name, (form, _) in keys.items():
        times[form].append(found[name])
    return times


def judged(plan: Plan, times: Mapping[Form, Sequence[float]]) -> tuple[Plan, Form]:
    """The plan with whole-model times, and the fastest form; every layer dense if swaps lost.

    times: seconds on each example. What is swapped has to be faster in sum than the best dense
    form, and on no example slower than it.
    """
    totals = {form: sum(seconds) for form, seconds in times.items()}
    dense = min((form for form in times if not form.swapped), key=totals.__getitem__)
    swapped = [form for form in times if form.swapped]
    best = min(swapped, key=totals.__getitem__, default=None)
    sound = [
        form
        for form in swapped
        if totals[form] < totals[dense]
        and all(a <= b for a, b in zip(times[form], times[dense], strict=True))
    ]
    taken = min(sound, key=totals.__getitem__, default=dense)
    narrow = [form for form in sound if form.half and totals[form] <= EVEN * totals[taken]]
    taken = min(narrow, key=totals.__getitem__, default=taken)
    found = dataclasses.replace(
        plan,
        dense_seconds=totals[dense],
        sparse_seconds=totals[best if taken is dense else taken] if best else None,
        layout=LAST if taken.last else "",
        dtype="bfloat16" if taken.half else "float32",
    )
    if taken.swapped:
        return dataclasses.replace(found, reason=f"faster than {dense}"), taken
    if best is None:
        return found, taken
    rows = tuple(
        dataclasses.replace(
            row, choice=DENSE, switch=(), reason=f"{row.reason}, but the whole model lost"
        )
        if row.switch or row.choice != DENSE
        else row
        for row in plan.rows
    )
    where = "as a whole" if totals[best] >= totals[dense] else "on one of the examples"
    reason = f"slower than {dense} {where}, so every layer stays dense"
    return dataclasses.replace(found, rows=rows, reason=reason), taken

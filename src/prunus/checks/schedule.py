"""Check a schedule."""

from __future__ import annotations

from prunus.checks.rules import Judge
from prunus.core import Schedule


def check_schedule(schedule: Schedule, *, steps: int = 2_000) -> None:
    """Raise ContractError, with the rule that broke and its repair, unless `schedule` fits.

    steps: how many are asked one by one; those around the end are asked as well.
    """
    judge = Judge("schedule", schedule)
    judge("type", isinstance(schedule, Schedule), f"it is a {type(schedule).__name__}")
    judge("type", bool(schedule.name) and isinstance(schedule.name, str), "it has no name")
    judge("range", _fits(schedule.final), f"final is {schedule.final!r}")
    last = schedule.last
    asked = list(range(steps))
    if last is not None:
        asked += range(max(0, last - 100), last + 100)
        asked += [last * 2 + 1, last + 1_000_003]
    values = {step: schedule.at(step) for step in asked}
    for step, value in values.items():
        judge("range", value is None or _fits(value), f"at({step}) is {value!r}")
    for step in reversed(asked):
        judge("same", schedule.at(step) == values[step], f"at({step}) changed when asked again")
    reached = {step: value for step, value in values.items() if value is not None}
    judge("some", bool(reached), f"no update in the first {steps} steps")
    if last is not None:
        judge("final", values[last] == schedule.final, f"at({last}) is {values[last]!r}")
        late = [step for step in reached if step > last]
        judge("after", not late, f"updates at {late[:3]}, after last={last}")
    other = [step for step, value in reached.items() if value != schedule.final]
    judge("gradual", schedule.gradual or not other, f"other sparsities at steps {other[:3]}")


def _fits(value: object) -> bool:
    return isinstance(value, (int, float)) and 0.0 <= value <= 1.0

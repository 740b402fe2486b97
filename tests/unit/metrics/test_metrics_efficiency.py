from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import ValueRangeError
from prunus.metrics import (
    Frontier,
    accuracy_density,
    correct_per_logit_and_parameter,
    hardness,
    parameter_efficiency,
    parameter_slack,
    with_index,
)

POINTS = [(1000, 0.80), (4000, 0.90), (3000, 0.70), (5000, 0.90), (64000, 0.96)]


def test_formulas_by_hand():
    assert accuracy_density(0.75, 2_500_000) == 30.0  # percent per million
    assert correct_per_logit_and_parameter(9000, 10, 45_000) == 0.02
    assert hardness(0.0) == 0.0
    assert hardness(0.99) == pytest.approx(math.log(100))
    assert hardness(1.0) == math.inf
    assert with_index(1000, 4000, 32) == 1125.0


def test_frontier_keeps_what_is_not_dominated_and_interpolates_in_log():
    frontier = Frontier(POINTS)
    assert frontier.points == ((1000, 0.80), (4000, 0.90), (64000, 0.96))
    assert frontier.reference(0.80) == 1000
    assert frontier.reference(0.85) == pytest.approx(2000)  # geometric mean of 1000 and 4000
    assert frontier.reference(0.92) == pytest.approx(4000 * 16 ** (1 / 3))
    assert frontier.reference(0.96) == 64000


def test_efficiency_and_slack():
    frontier = Frontier(POINTS)
    assert parameter_efficiency(0.90, 500, frontier) == 8.0
    assert parameter_slack(0.90, 500, frontier) == -3.0
    assert parameter_slack(0.90, 16000, frontier) == 2.0


@pytest.mark.parametrize("accuracy", [0.79, 0.97])
def test_outside_the_measured_range(accuracy):
    frontier = Frontier(POINTS)
    with pytest.raises(ValueRangeError, match=r"0\.8000 to 0\.9600"):
        parameter_efficiency(accuracy, 500, frontier)
    assert parameter_efficiency(accuracy, 500, frontier, outside="none") is None
    assert parameter_slack(accuracy, 500, frontier, outside="none") is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: accuracy_density(97.5, 10),
        lambda: accuracy_density(0.5, 0),
        lambda: accuracy_density(float("nan"), 10),
        lambda: hardness(-0.1),
        lambda: correct_per_logit_and_parameter(-1, 10, 10),
        lambda: correct_per_logit_and_parameter(1, 0, 10),
        lambda: Frontier([]),
        lambda: Frontier([(0, 0.5)]),
        lambda: Frontier(POINTS).reference(0.9, outside="extrapolate"),
        lambda: with_index(10, 10, 0),
        lambda: with_index(10, -1, 32),
    ],
)
def test_values_out_of_range_are_errors(call):
    with pytest.raises(ValueRangeError):
        call()


points = st.lists(
    st.tuples(st.integers(1, 10**9), st.integers(0, 1000).map(lambda a: a / 1000)),
    min_size=1,
    max_size=12,
)


@given(points, st.data())
def test_frontier_against_brute_force(measured, data):
    frontier = Frontier(measured)
    expected = {
        (p, a)
        for p, a in measured
        if not any(q <= p and b >= a and (q, b) != (p, a) for q, b in measured)
    }
    assert set(frontier.points) == expected
    for parameters, accuracy in frontier.points:
        assert parameter_efficiency(accuracy, parameters, frontier) == 1.0
    first, last = frontier.points[0][1], frontier.points[-1][1]
    low, high = sorted(data.draw(st.tuples(*[st.floats(first, last)] * 2)))
    lower, upper = frontier.reference(low), frontier.reference(high)
    assert lower is not None
    assert upper is not None
    assert lower <= upper * (1 + 1e-12)

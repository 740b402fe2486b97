from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.report import byte_size, count, duration, percent, plus_minus, ratio, spread


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(1234567), "1,234,567"),
        (count(None), "—"),
        (byte_size(0), "0 B"),
        (byte_size(999), "999 B"),
        (byte_size(1000), "1.00 kB"),
        (byte_size(1_234_567), "1.23 MB"),
        (byte_size(999_600), "1.00 MB"),
        (byte_size(5.5e12), "5,500 GB"),
        (duration(0.000123), "123 µs"),
        (duration(9.996e-4), "1.00 ms"),
        (duration(0.0421), "42.1 ms"),
        (duration(12.0), "12.0 s"),
        (duration(35e-9), "35.0 ns"),
        (duration(0), "0 ns"),
        (percent(0.9537), "95.4%"),
        (percent(0.99996), "99.9%"),
        (percent(1.0), "100.0%"),
        (percent(0.999996, 3), "99.999%"),
        (percent(None), "—"),
        (ratio(4.123), "4.12×"),
        (ratio(0.0996), "0.0996×"),
        (ratio(math.inf), "∞×"),
        (ratio(None), "—"),
        (spread("61 µs", "60 µs", "66 µs"), "61 µs (60–66 µs)"),
        (spread("1.0 ms", "900 µs", "1.1 ms"), "1.0 ms (900 µs–1.1 ms)"),
        (spread("4.1×", "3.9×", "4.4×"), "4.1× (3.9–4.4×)"),
        (spread("5%", "5%", "5%"), "5%"),
        (plus_minus(0.95, 0.002), "95.0 ± 0.2%"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text == expected


@given(st.floats(1e-9, 900))
def test_durations_keep_three_digits(seconds):
    number, unit = duration(seconds).split(" ")
    value = float(number) * {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}[unit]
    assert value == pytest.approx(seconds, rel=0.0051)
    assert 1 <= float(number) < 1000

"""Numbers as people read them, with units."""

from __future__ import annotations

import math

_DASH = "—"


def count(value: float | None) -> str:
    """1234567 -> '1,234,567'; None -> a dash."""
    return _DASH if value is None else f"{value:,.0f}"


def byte_size(value: float | None) -> str:
    """Bytes with decimal prefixes and three significant digits: 1234567 -> '1.23 MB'."""
    if value is None:
        return _DASH
    return f"{value:.0f} B" if abs(value) < 999.5 else _scaled(value, 1, ("B", "kB", "MB", "GB"))


def duration(seconds: float | None) -> str:
    """Seconds in a readable unit and three significant digits: 0.000123 -> '123 µs'."""
    return _DASH if seconds is None else _scaled(seconds, 1e-9, ("ns", "µs", "ms", "s"))


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.9537 -> '95.4%'; a fraction below 1 is never rounded up to 100%."""
    if fraction is None:
        return _DASH
    text = f"{100 * fraction:.{digits}f}"
    # 99.96% sparse is not empty, and 99.96% right is not flawless.
    if fraction < 1 and float(text) >= 100:
        text = f"{100 - 10**-digits:.{digits}f}"
    return f"{text}%"


def ratio(value: float | None) -> str:
    """4.123 -> '4.12×'."""
    return _DASH if value is None else f"{_three(value)}×"


def spread(middle: str, low: str, high: str) -> str:
    """A value with its range: '61 µs', '60 µs', '66 µs' -> '61 µs (60–66 µs)'."""
    if middle == low == high:
        return middle
    number, unit = _split(low)
    shorter = number if unit == _split(high)[1] else low
    return f"{middle} ({shorter}–{high})"


def plus_minus(mean: float, deviation: float, digits: int = 1) -> str:
    """Fractions as percent with a spread: 0.95, 0.002 -> '95.0 ± 0.2%'."""
    return f"{100 * mean:.{digits}f} ± {100 * deviation:.{digits}f}%"


def _split(text: str) -> tuple[str, str]:
    """A number and its unit: '61 µs' -> ('61', ' µs')."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZµ%× ")
    return number, text[len(number) :]


def _scaled(value: float, smallest: float, units: tuple[str, ...]) -> str:
    step = 0
    # 999.6 would read '1000': rounding to three digits decides the unit.
    while step + 1 < len(units) and abs(value) / (smallest * 1000**step) >= 999.5:
        step += 1
    return f"{_three(value / (smallest * 1000**step))} {units[step]}"


def _three(value: float) -> str:
    """Three significant digits without an exponent."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞" if value < 0 else _DASH
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.2e}")))))
    return f"{value:,.{digits}f}"

"""Weights that do not stay in the caches between calls: what reading them from memory costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.runtime import cache
from prunus.runtime.measure import interleaved

LAST_LEVEL = 32 << 20
"""Bytes of the last cache where the system does not tell."""

BUDGET = 0.1
"""Seconds of measuring the memory."""


@functools.cache
def last_level() -> int:
    """Bytes of the largest cache of the first processor."""
    found = [0]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        number = text.rstrip("KMG")
        found.append(int(number) * unit if number.isdigit() else 0)
    return max(found) or LAST_LEVEL


def streams(nonzeros: int) -> bool:
    """Whether weights of so many non-zeros, of two bytes at the least, exceed the caches."""
    return 2 * nonzeros > last_level()


def seconds_per_byte(key: Mapping[str, Any]) -> float:
    """Of reading memory with torch's threads, from the disk or by the clock."""
    count = 2 * last_level()
    asked = {**key, "what": "memory", "bytes": count}
    found = cache.get(asked, frozenset(["read"]))
    if found is None:
        held = torch.ones(count // 4)  # written: untouched pages are one and the same
        found = interleaved({"read": held.sum}, budget=BUDGET)
        cache.put(asked, found)
    return found["read"] / count


def sizes(
    key: Mapping[str, Any], names: Iterable[str], build: Callable[[str], nn.Module]
) -> dict[str, float]:
    """Bytes of a layer's weights in each of its ways, from the disk or by building them."""
    asked = {**key, "what": "sizes"}
    found = cache.get(asked, frozenset(names))
    if found is None:
        found = {name: float(_held(build(name))) for name in names}
        cache.put(asked, found)
    return found


def _held(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return max(1, sum(t.numel() * t.element_size() for t in tensors))

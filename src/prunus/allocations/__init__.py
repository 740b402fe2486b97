"""How much where? An allocation shares the sparsity between sites."""

from prunus.allocations.adaptive import lamp
from prunus.allocations.basic import er, erk, floor, global_, overrides, uniform
from prunus.allocations.budgets import budget
from prunus.allocations.costs import by_bytes, by_flops, by_latency, threshold
from prunus.allocations.measured import by_sensitivity

__all__ = [
    "budget",
    "by_bytes",
    "by_flops",
    "by_latency",
    "by_sensitivity",
    "er",
    "erk",
    "floor",
    "global_",
    "lamp",
    "overrides",
    "threshold",
    "uniform",
]

"""How much where? An allocation shares the sparsity between sites."""

from prunus.allocations.basic import er, erk, floor, global_, overrides, uniform

__all__ = ["er", "erk", "floor", "global_", "overrides", "uniform"]

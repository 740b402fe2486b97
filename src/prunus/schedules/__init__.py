"""How much when? A schedule maps the optimizer step to the sparsity to reach, or to None."""

from prunus.schedules.steps import constant, cubic, iterative, linear, one_shot

__all__ = ["constant", "cubic", "iterative", "linear", "one_shot"]

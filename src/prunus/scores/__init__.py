"""Which? A score gives every weight a number; higher = keep."""

from .data_free import magnitude, random
from .first_order import snip, synflow, taylor

__all__ = ["magnitude", "random", "snip", "synflow", "taylor"]

"""Which? A score gives every weight a number; higher = keep."""

from prunus.scores.data_free import magnitude, random
from prunus.scores.first_order import snip, synflow, taylor

__all__ = ["magnitude", "random", "snip", "synflow", "taylor"]

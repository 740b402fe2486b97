"""Put slots together; the one table of what may not be combined."""

from prunus.compose.build import compose
from prunus.compose.slots import REFUSALS, Slots

__all__ = ["REFUSALS", "Slots", "compose"]

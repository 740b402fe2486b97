"""In which shape? A structure groups weights into units that live or die together."""

from prunus.structures.shapes import block, channel, element, n_of_m

__all__ = ["block", "channel", "element", "n_of_m"]

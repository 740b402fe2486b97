"""In which shape? A structure groups weights into units that live or die together."""

from prunus.structures.parts import filter, head, layer, neuron, strided, stripe
from prunus.structures.rows import fan_in, kernel_pattern, vector
from prunus.structures.shapes import block, channel, element, n_of_m

__all__ = [
    "block",
    "channel",
    "element",
    "fan_in",
    "filter",
    "head",
    "kernel_pattern",
    "layer",
    "n_of_m",
    "neuron",
    "strided",
    "stripe",
    "vector",
]

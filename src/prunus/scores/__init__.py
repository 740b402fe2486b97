"""Which? A score gives every weight a number; higher = keep."""

from prunus.scores.activation import wanda
from prunus.scores.data_free import magnitude, random
from prunus.scores.designed import banded, expander
from prunus.scores.first_order import snip, synflow, taylor
from prunus.scores.second_order import block_fisher, diagonal_fisher, layerwise_obs, obd, obs

__all__ = [
    "banded",
    "block_fisher",
    "diagonal_fisher",
    "expander",
    "layerwise_obs",
    "magnitude",
    "obd",
    "obs",
    "random",
    "snip",
    "synflow",
    "taylor",
    "wanda",
]

"""Named methods: recipes of slots, with their papers' defaults."""

from prunus.methods.dynamic import rigl, set_
from prunus.methods.fixed import fixed
from prunus.methods.lottery import Ticket, lottery_ticket
from prunus.methods.pruning import (
    gradual_magnitude,
    one_shot_magnitude,
    random_pruning,
    snip,
    synflow,
)

__all__ = [
    "Ticket",
    "fixed",
    "gradual_magnitude",
    "lottery_ticket",
    "one_shot_magnitude",
    "random_pruning",
    "rigl",
    "set_",
    "snip",
    "synflow",
]

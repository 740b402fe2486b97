"""Named methods: recipes of slots, with their papers' defaults."""

from .dynamic import rigl, set_
from .fixed import fixed
from .lottery import Ticket, lottery_ticket
from .pruning import gradual_magnitude, one_shot_magnitude, random_pruning, snip, synflow

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

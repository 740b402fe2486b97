"""The driver: the only impure Python between a pure method and a living model."""

from .attach import Attached, attach, attached
from .once import prune
from .signals import Sources, collect, evaluating

__all__ = ["Attached", "Sources", "attach", "attached", "collect", "evaluating", "prune"]

"""The driver: the only impure Python between a pure method and a living model."""

from prunus.drive.attach import Attached, attach
from prunus.drive.eigendamage import Rotated, eigendamage
from prunus.drive.once import prune
from prunus.drive.registry import attached
from prunus.drive.scan import sensitivity
from prunus.drive.sequential import prune_sequential
from prunus.drive.signals import Sources, collect

__all__ = [
    "Attached",
    "Rotated",
    "Sources",
    "attach",
    "attached",
    "collect",
    "eigendamage",
    "prune",
    "prune_sequential",
    "sensitivity",
]

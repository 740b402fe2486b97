"""Collect the signals that a sparsifier asks for."""

from prunus.drive.signals.sources import Loss, Sources, as_call, untouched
from prunus.drive.signals.table import COLLECTORS, collect

__all__ = ["COLLECTORS", "Loss", "Sources", "as_call", "collect", "untouched"]

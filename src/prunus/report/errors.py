"""The error of this package."""

from __future__ import annotations

from prunus.errors import PrunusError


class ReportError(PrunusError, RuntimeError):
    """A report cannot be made: a library is missing, or a picture is not self-contained."""

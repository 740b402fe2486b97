"""Every error that prunus raises on purpose; a message names place, shape and remedy."""

from __future__ import annotations


class PrunusError(Exception):
    """Base of all errors raised by prunus."""


class ShapeError(PrunusError, ValueError):
    """A shape does not fit: it does not divide, does not match, or is not supported."""


class TargetError(PrunusError, ValueError):
    """A sparsity that was asked for cannot be reached; names the sites that stand in the way."""


class ValueRangeError(PrunusError, ValueError):
    """An argument is outside its allowed range."""


class NotFiniteError(PrunusError, ValueError):
    """A weight, gradient or score holds NaN; names the site."""


class SignalError(PrunusError, RuntimeError):
    """A sparsifier needs a signal (gradient, inputs, loss) that was not provided."""


class CompositionError(PrunusError, TypeError):
    """Slots that may not be combined, or a slot that breaks its contract."""


class ContractError(PrunusError, AssertionError):
    """A part breaks a rule of its contract; raised by prunus.checks, names rule and repair."""


class SiteError(PrunusError, KeyError):
    """A pattern matches no prunable parameter, or a model has none."""

    def __str__(self) -> str:
        """Show the message itself; KeyError would show its repr."""
        return str(self.args[0]) if self.args else ""


class AttachError(PrunusError, RuntimeError):
    """A sparsifier cannot be attached to this model and optimizer."""


class DisagreementError(PrunusError, RuntimeError):
    """Ranks of a distributed run hold different masks."""


class MissingFileError(PrunusError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class FormatError(PrunusError, ValueError):
    """A packed file or buffer is truncated, corrupt, hostile, or of an unknown version."""


class RecipeError(PrunusError, ValueError):
    """A recipe is wrong; the message names file, line and the allowed values."""


class MissingPackageError(PrunusError, ImportError):
    """An optional package is not installed; the message names the command that installs it."""

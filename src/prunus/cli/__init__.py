"""The command line."""

from prunus.cli.main import main

__all__ = ["main"]

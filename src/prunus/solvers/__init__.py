"""Repair? A solver picks the mask from unit scores and may rewrite the weights that stay."""

from prunus.solvers.selection import top_k

__all__ = ["top_k"]

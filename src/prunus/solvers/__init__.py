"""Repair? A solver picks the mask from unit scores and may rewrite the weights that stay."""

from prunus.solvers.admm import alps
from prunus.solvers.columns import sparsegpt
from prunus.solvers.greedy import exact_obc, obs
from prunus.solvers.patterns import pattern_library
from prunus.solvers.refit import block_fisher, least_squares
from prunus.solvers.selection import top_k

__all__ = [
    "alps",
    "block_fisher",
    "exact_obc",
    "least_squares",
    "obs",
    "pattern_library",
    "sparsegpt",
    "top_k",
]

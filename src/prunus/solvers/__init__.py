"""Repair? A solver picks the mask from unit scores and may rewrite the weights that stay."""

from prunus.solvers.admm import alps
from prunus.solvers.channels import channel_lasso, greedy_forward, thinet
from prunus.solvers.columns import sparsegpt
from prunus.solvers.fisher import kfac, matrix_free_fisher
from prunus.solvers.folding import fold, merge
from prunus.solvers.greedy import exact_obc, obs
from prunus.solvers.net_trim import net_trim
from prunus.solvers.patterns import pattern_library
from prunus.solvers.refit import block_fisher, least_squares
from prunus.solvers.selection import top_k

__all__ = [
    "alps",
    "block_fisher",
    "channel_lasso",
    "exact_obc",
    "fold",
    "greedy_forward",
    "kfac",
    "least_squares",
    "matrix_free_fisher",
    "merge",
    "net_trim",
    "obs",
    "pattern_library",
    "sparsegpt",
    "thinet",
    "top_k",
]

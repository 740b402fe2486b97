"""How much when? A schedule maps the optimizer step to the sparsity to reach, or to None."""

from prunus.schedules.phases import adaptive, cyclic, dense_sparse_dense, threshold_ramp
from prunus.schedules.steps import constant, cosine, cubic, exponential, iterative, linear, one_shot

__all__ = [
    "adaptive",
    "constant",
    "cosine",
    "cubic",
    "cyclic",
    "dense_sparse_dense",
    "exponential",
    "iterative",
    "linear",
    "one_shot",
    "threshold_ramp",
]

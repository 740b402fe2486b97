"""Which? A score gives every weight a number; higher = keep."""

from prunus.scores.activation import input_variance, wanda
from prunus.scores.data_free import magnitude, random
from prunus.scores.designed import banded, expander
from prunus.scores.first_order import force, grasp, snip, synflow, taylor, taylor_group
from prunus.scores.fisher import kfac, matrix_free_fisher
from prunus.scores.outputs import (
    apoz,
    batchnorm_scale,
    constant_output,
    correlation,
    geometric_median,
    mean_activation,
    nisp,
    sensitivity,
    similarity,
    skeletonization,
    taylor_filter,
)
from prunus.scores.second_order import block_fisher, diagonal_fisher, layerwise_obs, obd, obs
from prunus.scores.training import movement, total_change

__all__ = [
    "apoz",
    "banded",
    "batchnorm_scale",
    "block_fisher",
    "constant_output",
    "correlation",
    "diagonal_fisher",
    "expander",
    "force",
    "geometric_median",
    "grasp",
    "input_variance",
    "kfac",
    "layerwise_obs",
    "magnitude",
    "matrix_free_fisher",
    "mean_activation",
    "movement",
    "nisp",
    "obd",
    "obs",
    "random",
    "sensitivity",
    "similarity",
    "skeletonization",
    "snip",
    "synflow",
    "taylor",
    "taylor_filter",
    "taylor_group",
    "total_change",
    "wanda",
]

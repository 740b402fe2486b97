"""Training that stores and computes only what is there."""

from prunus.training import recipes
from prunus.training.averaging import average
from prunus.training.candidates import LargestGradients
from prunus.training.driver import Dynamic, dynamic
from prunus.training.layers import SparseWeight, TrainableConv2d, TrainableLinear
from prunus.training.pattern import Pattern
from prunus.training.planner import Choice, tune
from prunus.training.recipes import Move, Recipe
from prunus.training.swap import sparse_training, to_dense
from prunus.training.topology import check_topology, rewire

__all__ = [
    "Choice",
    "Dynamic",
    "LargestGradients",
    "Move",
    "Pattern",
    "Recipe",
    "SparseWeight",
    "TrainableConv2d",
    "TrainableLinear",
    "average",
    "check_topology",
    "dynamic",
    "recipes",
    "rewire",
    "sparse_training",
    "to_dense",
    "tune",
]

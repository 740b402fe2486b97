"""Training that stores and computes only what is there."""

from prunus.training.layers import SparseWeight, TrainableConv2d, TrainableLinear
from prunus.training.pattern import Pattern
from prunus.training.swap import Choice, sparse_training, to_dense, tune
from prunus.training.topology import Dynamic, LargestGradients, check_topology, dynamic, rewire

__all__ = [
    "Choice",
    "Dynamic",
    "LargestGradients",
    "Pattern",
    "SparseWeight",
    "TrainableConv2d",
    "TrainableLinear",
    "check_topology",
    "dynamic",
    "rewire",
    "sparse_training",
    "to_dense",
    "tune",
]

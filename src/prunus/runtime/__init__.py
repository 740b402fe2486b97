"""Running and storing sparse models: packed files, packed layers, and the planner."""

from prunus.runtime.compile import compile
from prunus.runtime.conv1d import SparseConv1d
from prunus.runtime.files import FileLayer, layers_from_file
from prunus.runtime.modules import SparseConv2d, SparseLinear
from prunus.runtime.plan import Layer, Plan, Row
from prunus.runtime.store import Saved, load, save
from prunus.runtime.tables import latency_table
from prunus.runtime.verify import VerificationError
from prunus.runtime.weight import PackedWeight

__all__ = [
    "FileLayer",
    "Layer",
    "PackedWeight",
    "Plan",
    "Row",
    "Saved",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "VerificationError",
    "compile",
    "latency_table",
    "layers_from_file",
    "load",
    "save",
]

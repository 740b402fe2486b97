"""prunus: sparse neural networks on the CPUs that people have."""

from pathlib import Path

import torch

from prunus import (
    allocations,
    combine,
    growth,
    methods,
    schedules,
    scores,
    search,
    solvers,
    structures,
    training,
)
from prunus.compose import compose
from prunus.core import Context, Score, Site, Sparsifier, State
from prunus.drive import Attached, attach, attached, prune, sensitivity
from prunus.errors import PrunusError
from prunus.evidence import Evidence, evidence
from prunus.kernels import share_threads
from prunus.metrics import flops_table
from prunus.runtime import (
    Plan,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
    compile,
    latency_table,
    load,
    save,
)
from prunus.training import sparse_training

__version__ = "0.1.0"

share_threads(Path(torch.__file__).parent)

__all__ = [
    "Attached",
    "Context",
    "Evidence",
    "Plan",
    "PrunusError",
    "Score",
    "Site",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "Sparsifier",
    "State",
    "__version__",
    "allocations",
    "attach",
    "attached",
    "combine",
    "compile",
    "compose",
    "evidence",
    "flops_table",
    "growth",
    "latency_table",
    "load",
    "methods",
    "prune",
    "save",
    "schedules",
    "scores",
    "search",
    "sensitivity",
    "solvers",
    "sparse_training",
    "structures",
    "training",
]

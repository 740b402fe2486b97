"""prunus: sparse neural networks on the CPUs that people have."""

from prunus import allocations, combine, growth, methods, schedules, scores, solvers, structures
from prunus.compose import compose
from prunus.drive import Attached, attach, attached, prune
from prunus.errors import PrunusError
from prunus.evidence import Evidence, evidence
from prunus.runtime import Plan, SparseConv2d, SparseLinear, compile, load, save

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "Evidence",
    "Plan",
    "PrunusError",
    "SparseConv2d",
    "SparseLinear",
    "__version__",
    "allocations",
    "attach",
    "attached",
    "combine",
    "compile",
    "compose",
    "evidence",
    "growth",
    "load",
    "methods",
    "prune",
    "save",
    "schedules",
    "scores",
    "solvers",
    "structures",
]

"""prunus: sparse neural networks on the CPUs that people have."""

from . import allocations, combine, growth, methods, schedules, scores, solvers, structures
from .compose import compose
from .drive import Attached, attach, attached, prune
from .errors import PrunusError

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "PrunusError",
    "__version__",
    "allocations",
    "attach",
    "attached",
    "combine",
    "compose",
    "growth",
    "methods",
    "prune",
    "schedules",
    "scores",
    "solvers",
    "structures",
]

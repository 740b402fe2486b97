"""Contract checks: run them on a part of your own, and it will fit the rest of prunus."""

from prunus.checks.allocation import check_allocation
from prunus.checks.growth import check_growth
from prunus.checks.probes import DTYPES, SHAPES, SITES
from prunus.checks.rules import RULES
from prunus.checks.schedule import check_schedule
from prunus.checks.score import check_score
from prunus.checks.solver import check_solver
from prunus.checks.sparsifier import check_sparsifier
from prunus.checks.structure import check_structure

__all__ = [
    "DTYPES",
    "RULES",
    "SHAPES",
    "SITES",
    "check_allocation",
    "check_growth",
    "check_schedule",
    "check_score",
    "check_solver",
    "check_sparsifier",
    "check_structure",
]

"""Search for the sparsity of each site, at a fixed total, by an objective of the user."""

from prunus.search.genetic import evolve
from prunus.search.sampler import search
from prunus.search.space import Found

__all__ = ["Found", "evolve", "search"]

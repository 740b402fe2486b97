"""Scores that look at the weights alone."""

from __future__ import annotations

from prunus import rng
from prunus.core import Score


def magnitude() -> Score:
    """Keep large weights: |w|.

    Source: Hagiwara 1993; Han, Pool, Tran, Dally 2015, arXiv 1506.02626.
    """
    return Score("magnitude", lambda w, at: w.abs(), cheap=True)


def random() -> Score:
    """Keep weights at random: u ~ U[0, 1), the baseline that every score has to beat.

    Depends on seed, step, round and site only. Source: e.g. Mittal et al. 2018, arXiv 1801.10447.
    """
    return Score("random", lambda w, at: rng.uniform(at.key, tuple(w.shape)).to(w.device))

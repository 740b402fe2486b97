"""Stateless random numbers: a draw depends on its key alone, never on what was drawn before.

The same key gives the same numbers on every rank, after every resume and on every device, because
draws are made on the CPU by a generator that is seeded from a hash of the key.
"""

from __future__ import annotations

import hashlib
from operator import index

import torch
from torch import Tensor

Key = tuple[int | str, ...]


def generator(key: Key) -> torch.Generator:
    """Return a fresh CPU generator for `key` (any tuple of ints and strings)."""
    # np.int64(3) and 3 are one key: a seed is a plain int again after a resume.
    plain = tuple(part if isinstance(part, str) else index(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(key: Key, shape: tuple[int, ...]) -> Tensor:
    """Return float32 draws from [0, 1), in `shape`, on the CPU."""
    return torch.rand(shape, generator=generator(key))

"""Make sure that all ranks of a distributed run hold the same masks."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.distributed as dist

from prunus.core import Masks
from prunus.errors import DisagreementError


def fingerprint(masks: Masks) -> int:
    """Hash names and bits of all masks to 63 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(masks):
        digest.update(name.encode())
        digest.update(np.packbits(masks[name].cpu().numpy().reshape(-1)).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def check_agreement(masks: Masks, step: int, device: torch.device) -> None:
    """Raise DisagreementError on every rank if any rank holds other masks. Collective."""
    mine = torch.tensor([fingerprint(masks)], dtype=torch.int64, device=device)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if int(low) != int(high):
        raise DisagreementError(
            f"ranks hold different masks after the update at step {step}: start all ranks from "
            f"the same weights and seed, and attach to the model that is wrapped in DDP"
        )

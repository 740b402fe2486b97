"""Two ranks of torch.distributed that meet in a file: no port that another process may take."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined(rank: int, meeting: str) -> Iterator[None]:
    """Be one of two ranks on one thread; meeting: a path where no file is yet."""
    torch.set_num_threads(1)
    if sys.platform.startswith("linux"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else it asks for the name of this machine
    store = dist.FileStore(meeting, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()

"""Two ranks of torch.distributed that meet in a file: no port that another process may take."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_PATIENCE = 240  # seconds: a rank that hangs shows where and ends, before the test's own limit


@contextmanager
def joined(rank: int, meeting: str) -> Iterator[None]:
    """Be one of two ranks on one thread, and end the process; meeting: a path without a file.

    Gloo's thread may still wait for the GIL, to drop the tensor of the last reduction, when the
    last owner of the group (a DDP model) dies with the GIL held and joins that thread: torch 2.13
    then hangs, once in some dozen runs. So a rank that did its work leaves without destructors.
    """
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)
    torch.set_num_threads(1)
    if sys.platform.startswith("linux"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else it asks for the name of this machine
    store = dist.FileStore(meeting, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    yield
    dist.barrier()  # the other rank may still read what this one sent
    os._exit(0)

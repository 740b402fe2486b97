"""One thread and fixed seeds, so that a test means the same on every machine."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "prunus", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("prunus")
os.environ["PRUNUS_CACHE"] = ""  # times measured in one test decide nothing in another


@pytest.fixture(autouse=True)
def _quiet_machine():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)

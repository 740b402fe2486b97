"""A global top-k over 100 million weights holds one extra copy of the largest site, no more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json
import torch
from prunus import allocations, methods
from prunus.core import Signals, Site

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
shapes = [(8192, 4096), (8192, 4096), (2048, 8192), (4096, 2048), (1000, 4096),
          (2048, 2048, 1, 1), (1001, 999)]
sites = [Site(f"s{i}", shape) for i, shape in enumerate(shapes)]
generator = torch.Generator().manual_seed(0)
weights = {s.name: torch.empty(s.shape).normal_(generator=generator) for s in sites}
method = methods.one_shot_magnitude(0.9, allocation=allocations.global_())
before = peak()
state = method.init(sites, weights, 0)
state = method.update(state, sites, weights, Signals()).state
extra = peak() - before
lowest = min(float(weights[n].abs()[m].min()) for n, m in state.masks.items())
highest = max(float(weights[n].abs()[~m].max()) for n, m in state.masks.items())
print(json.dumps({
    "weights": sum(s.size for s in sites),
    "kept": sum(int(m.sum()) for m in state.masks.values()),
    "extra": extra,
    "ordered": lowest >= highest,
}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads VmHWM from /proc")
def test_global_top_k_over_100_million_weights_copies_one_site_at_a_time():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] >= 100_000_000
    assert abs(found["kept"] - 0.1 * found["weights"]) <= 1
    assert found["ordered"]
    # The masks, one copy of the scores of the largest site, and what a chunk or a sample takes. It
    # was 260 MiB when this was written; a second copy of the largest site would make it 388.
    masks, largest = found["weights"], 4 * 8192 * 4096
    assert found["extra"] < masks + largest + 80 * 2**20, f"{found['extra'] / 2**20:.0f} MiB"

"""How to judge a network: counts, FLOPs, bytes, peak memory, latency, accuracy, efficiency."""

from prunus.metrics.accuracy import Accuracy, accuracy
from prunus.metrics.counts import Counts, SiteCount, counts, counts_of_tensors
from prunus.metrics.efficiency import (
    Frontier,
    accuracy_density,
    correct_per_logit_and_parameter,
    hardness,
    parameter_efficiency,
    parameter_slack,
    with_index,
)
from prunus.metrics.flops import Flops, flops
from prunus.metrics.latency import Latency, Ratio, compare, latency, speedup, threads
from prunus.metrics.memory import PeakMemory, peak_memory
from prunus.metrics.sizes import dense_bytes, file_bytes
from prunus.metrics.tables import flops_table

__all__ = [
    "Accuracy",
    "Counts",
    "Flops",
    "Frontier",
    "Latency",
    "PeakMemory",
    "Ratio",
    "SiteCount",
    "accuracy",
    "accuracy_density",
    "compare",
    "correct_per_logit_and_parameter",
    "counts",
    "counts_of_tensors",
    "dense_bytes",
    "file_bytes",
    "flops",
    "flops_table",
    "hardness",
    "latency",
    "parameter_efficiency",
    "parameter_slack",
    "peak_memory",
    "speedup",
    "threads",
    "with_index",
]

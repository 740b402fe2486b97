"""Times of each layer at several sparsities: what a budget of milliseconds reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prunus import kernels, select
from prunus import sites as sites_
from prunus.arguments import check_sparsity
from prunus.errors import ValueRangeError
from prunus.runtime import candidates
from prunus.runtime.decide import Options, measured
from prunus.runtime.measure import thread_count
from prunus.runtime.verify import same_randomness

_LEVELS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)


def latency_table(
    model: nn.Module,
    example_inputs: Any,
    sparsities: Sequence[float] = _LEVELS,
    *,
    threads: int | None = None,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
) -> dict[str, dict[float, float]]:
    """Return {site: {sparsity: milliseconds}}, measured layer by layer as `compile` measures them.

    What `allocations.by_latency` reads, with losses from pr.sensitivity at the same sparsities. A
    layer is timed on its real input shapes with its smallest weights removed; where its packed form
    does not win, the dense time stands, as `compile` leaves such a layer dense. A weight whose
    layer cannot run sparse has 0 at every level: no sparsity changes its time. Sparsity 0 is always
    there. example_inputs, threads: as for `compile`. Raises ValueRangeError for a
    sparsity outside of [0, 1) or without the native module.
    """
    levels = sorted({0.0, *(check_sparsity(level) for level in sparsities)})
    if levels[-1] >= 1.0:
        raise ValueRangeError("a layer without weights has no time; ask for sparsities below 1")
    if kernels.active_isa() == kernels.FALLBACK:
        raise ValueRangeError("no native module: the NumPy kernels say nothing about latency")
    model = sites_.unwrap(model)
    found = sites_.find(model, include, exclude)
    threads = torch.get_num_threads() if threads is None else threads
    options = Options(threads, 0.0, torch.float32, duplicate_weights=False, choose=None)
    with thread_count(threads), torch.no_grad(), sites_.evaluating(model):
        with same_randomness():
            calls = candidates.record(model, example_inputs)
        layers, owners = candidates.layers_of(model), candidates.tied_owners(model)
        table = {}
        for site in found:
            layer = site.name.removesuffix(".weight")
            module = layers.get(layer)
            known = module is not None and site.name == f"{layer}.weight"
            if module is None or not known or candidates.refusal(module, owners, calls[layer]):
                table[site.name] = dict.fromkeys(levels, 0.0)
            else:
                table[site.name] = _times(layer, module, calls[layer], levels, options)
    return table


def _times(
    name: str, module: nn.Module, calls: Any, levels: Sequence[float], options: Options
) -> dict[float, float]:
    """Return {sparsity: milliseconds} of one layer: the dense time by the measured ratio."""
    trial = copy.deepcopy(module).eval()
    times: dict[float, float] = {}
    for level in levels:
        weight = trial.get_parameter("weight")
        scores = weight.detach().abs().reshape(1, -1)
        keep = max(1, round((1.0 - level) * scores.shape[1]))
        weight.mul_(select.keep_top(scores, keep).reshape(weight.shape))
        layer = candidates.layer_of(name, trial)
        ways = candidates.ways_of(layer, trial, options.dtype)
        row = measured(layer, trial, calls, ways, options)
        assert row.dense_seconds is not None
        dense = times.setdefault(0.0, 1e3 * row.dense_seconds)
        if level:
            ratio = row.sparse_seconds / row.dense_seconds if row.sparse_seconds else 1.0
            times[level] = dense * ratio if row.sparse else dense
    return times

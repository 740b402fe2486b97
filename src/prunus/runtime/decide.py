"""The choice for every layer: by measuring its ways to run, by the caller, or by an older plan."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus import kernels
from prunus.errors import ValueRangeError
from prunus.runtime import cache, candidates, streaming
from prunus.runtime.assemble import assemble, in_channels_last
from prunus.runtime.candidates import Call, Calls, Candidate
from prunus.runtime.epilogue import Fusing
from prunus.runtime.measure import interleaved, machine
from prunus.runtime.plan import BITMAP_INT8, DENSE, DIRECT, SPARSE, Layer, Plan, Row
from prunus.runtime.switch import Switch, bounds, bucket_of, rows_of
from prunus.runtime.unserved import unserved

Choose = Callable[[Layer], str]
Times = Mapping[int, Mapping[str, float]]
"""{bucket of N: {way: seconds, weighted by the number of calls}}"""

MARGIN = 1.05
"""A way must be this many times faster than the best dense one to be taken in its place."""
LEVEL = 0.95
"""A direct layer may be this much slower than dense: between packed layers it needs no change of
layout and becomes part of a network, which is worth more than the difference."""
LAYER_BUDGET = 0.15
"""Seconds of measuring per layer and bucket."""
MOST_BUCKETS = 8
"""Buckets per layer that are measured, the most frequent first."""
LAST = "channels_last"
APART = "channels_last between contiguous images"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller of `compile` asked for."""

    threads: int
    minimum_sparsity: float
    dtype: torch.dtype
    duplicate_weights: bool
    choose: Choose | None
    memory: float = 0.0
    """Seconds of reading a byte of weights; 0 where they stay in the caches between calls."""

    @property
    def replayed(self) -> Plan | None:
        """The plan whose `choose` the caller gave."""
        owner = getattr(self.choose, "__self__", None)
        return owner if isinstance(owner, Plan) else None


def decide(model: nn.Module, calls: Calls, options: Options) -> tuple[Plan, dict[str, nn.Module]]:
    """The plan layer by layer, and {name: module} of the layers that run in another way."""
    owners = candidates.tied_owners(model)
    tied = candidates.tied_outputs(model) if options.dtype == torch.int8 else frozenset()
    rows: list[Row] = []
    twins: dict[str, nn.Module] = {}
    modules = candidates.layers_of(model)
    layers = {name: candidates.layer_of(name, module) for name, module in modules.items()}
    if options.choose is None and streaming.streams(sum(x.nonzeros for x in layers.values())):
        memory = streaming.seconds_per_byte(environment(options.threads))
        options = dataclasses.replace(options, memory=memory)
    for name, module in modules.items():
        layer = layers[name]
        reason = candidates.refusal(module, owners, calls[name], name in tied)
        ways = {} if reason else candidates.ways_of(layer, module, options.dtype)
        if reason:
            row = row_of(layer, DENSE, reason)
        elif options.choose is not None:
            row = _chosen(options, layer, ways)
        else:
            row = measured(layer, module, calls[name], ways, options)
        if row.switch or row.choice != DENSE:
            twins[name] = _built(row, module, ways)
        rows.append(row)
    rows += unserved(model, options.minimum_sparsity)
    reason = "as chosen" if options.choose else "not measured as a whole"
    reason = reason if any(row.sparse for row in rows) else _NO_LAYER
    where = (options.threads, kernels.active_isa(), machine())
    return Plan(tuple(rows), *where, reason), twins


_NO_LAYER = "no layer runs sparse, the model stays dense"


def row_of(layer: Layer, choice: str, reason: str, **facts: Any) -> Row:
    """A row of the plan."""
    return Row(layer.name, layer.kind, layer.shape, layer.sparsity, choice, reason, **facts)


def _chosen(options: Options, layer: Layer, ways: Mapping[str, Candidate]) -> Row:
    """The caller's choice, checked."""
    assert options.choose is not None
    known = None if options.replayed is None else options.replayed.row_of(layer)
    switch = known.switch if known is not None and options.duplicate_weights else ()
    choice = options.choose(layer)
    for name in (choice, *(way for _, way in switch)):
        if name not in (*ways, DENSE):
            expected = " or ".join(repr(way) for way in (*ways, DENSE))
            raise ValueRangeError(
                f"choose returned {name!r} for layer {layer.name!r}, expected {expected}"
            )
    return row_of(layer, choice, "chosen by the caller", switch=switch)


def _built(row: Row, module: nn.Module, ways: Mapping[str, Candidate]) -> Fusing:
    """The module that a row asks for."""
    if not row.switch:
        return ways[row.choice].build(module)
    names = dict.fromkeys(way for _, way in row.switch)
    if row.choice in names:  # the way of most calls comes first
        names = {row.choice: None} | names
    built = {
        name: ways[name].build(module) if name in ways else candidates.dense_layer(module)
        for name in names
    }
    width = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    return Switch(int(width), built, row.switch)  # pyright: ignore[reportArgumentType]


def measured(
    layer: Layer,
    module: nn.Module,
    calls: Mapping[Call, int],
    ways: Mapping[str, Candidate],
    options: Options,
) -> Row:
    """The row of a layer that is left to the clock."""
    reason = ""
    if layer.sparsity < options.minimum_sparsity:
        reason = f"less than {options.minimum_sparsity:.0%} sparse"
    elif kernels.active_isa() == kernels.FALLBACK:
        reason = "no native module: the NumPy kernels are for checking only"
    few = layer.sparsity < options.minimum_sparsity and kernels.active_isa() != kernels.FALLBACK
    # The direct way is the packed twin again: it stands in where that is not tried. Bytes are
    # fewer than what is dense holds, at any sparsity.
    tried = {
        name: way
        for name, way in ways.items()
        if (few if name == DIRECT else not (reason and way.sparse) or (few and name == BITMAP_INT8))
    }
    if not tried:
        return row_of(layer, DENSE, reason)
    row = judged(layer, _times(layer, module, calls, tried, options), tried, options)
    return dataclasses.replace(row, reason=f"{reason}; {row.reason}" if reason else row.reason)


def judged(layer: Layer, times: Times, ways: Mapping[str, Candidate], options: Options) -> Row:
    """The row that follows from the times of `ways`, DENSE and for a convolution its LAST form."""
    totals: Counter[str] = Counter()
    for seconds in times.values():
        totals.update(seconds)
    choice, reason = _verdict(totals, ways)
    sparse = [name for name in totals if name in ways and ways[name].sparse]
    dense = [name for name in totals if name not in sparse]
    facts = {
        "sparse_seconds": min((totals[name] for name in sparse), default=None),
        "dense_seconds": min(totals[name] for name in dense),
    }
    if options.duplicate_weights:
        best = {bucket: _verdict(seconds, ways)[0] for bucket, seconds in times.items()}
        if len(set(best.values())) > 1:
            return row_of(layer, choice, reason, switch=bounds(best), **facts)
    return row_of(layer, choice, reason, **facts)


def _verdict(seconds: Mapping[str, float], ways: Mapping[str, Candidate]) -> tuple[str, str]:
    """(choice, reason): the fastest way if it beats what is simpler by MARGIN."""
    sparse = [name for name in seconds if name in ways and ways[name].sparse]
    plain = [name for name in seconds if name not in ways]
    best = min((name for name in seconds if name not in sparse), key=seconds.__getitem__)
    against = {DENSE: DENSE, LAST: f"dense ({LAST})"}.get(best, best)
    if sparse:
        way = _fastest({name: seconds[name] for name in sparse}, ways)
        ratio = seconds[best] / seconds[way]
        if ratio >= MARGIN:
            return way, f"{ratio:.2f}x {against}"
        lost = f"{ratio:.2f}x {against}, below {MARGIN}x"
    else:
        lost = ""
    base = min(plain, key=seconds.__getitem__)
    if best == base and seconds[base] >= LEVEL * seconds.get(DIRECT, math.inf):
        best = DIRECT
    ratio = seconds[base] / seconds[best]
    if best in ways and ratio >= (LEVEL if best == DIRECT else MARGIN):
        return best, f"{ratio:.2f}x {DENSE}" + (f", sparse {lost}" if lost else "")
    return DENSE, lost or f"{best} {ratio:.2f}x, below {MARGIN}x"


def _fastest(seconds: Mapping[str, float], ways: Mapping[str, Candidate]) -> str:
    """The fastest sparse way; those that beat csr by less than their margin do not count."""
    base = seconds.get(SPARSE, math.inf)
    worth = [name for name in seconds if seconds[name] * ways[name].margin <= base]
    return min(worth or [SPARSE], key=seconds.__getitem__)


def _times(
    layer: Layer,
    module: nn.Module,
    calls: Mapping[Call, int],
    ways: Mapping[str, Candidate],
    options: Options,
) -> Times:
    """Seconds of every way by bucket, from the disk or the clock."""
    # Direct layers stand between packed ones: torch has to take and give contiguous images, too.
    last = APART if DIRECT in ways else LAST
    names = (*ways, DENSE, last) if layer.kind == "conv2d" else (*ways, DENSE)
    runners = {
        name: functools.cache(functools.partial(_runner, name, module, ways)) for name in names
    }
    found = {}
    for bucket, (call, count) in _buckets(layer.kind, calls).items():
        key = _key(layer, module, call, bucket, options.threads)

        def runs(call: Call = call) -> dict[str, Callable[[], Any]]:
            x = call.sample()
            inputs = dict.fromkeys(runners, x) | {LAST: channels_last(x), APART: x.contiguous()}
            return {name: bound(make(), inputs[name]) for name, make in runners.items()}

        seconds = timed(key, runners, runs)
        if options.memory:  # the clock finds weights in the caches, the model will not
            weight = environment(options.threads) | _weight(layer, module)
            held = streaming.sizes(weight, runners, lambda name: runners[name]())
            seconds = {name: seconds[name] + options.memory * held[name] for name in runners}
        # In the order of the ways, whether from the clock or the disk: it decides equal times.
        found[bucket] = {name: count * seconds[name] for name in runners}
    return found


def _runner(name: str, module: nn.Module, ways: Mapping[str, Candidate]) -> nn.Module:
    """A layer in one of its ways."""
    if name in ways:
        return ways[name].build(module)
    if name in (LAST, APART):
        last = in_channels_last(copy.deepcopy(module).eval())
        return last if name == LAST else _Contiguous(last)
    return assemble(module, {}, share=True)


class _Contiguous(nn.Sequential):
    """A layer whose images come out contiguous."""

    def forward(self, input: Tensor) -> Tensor:
        """Run it, then convert."""
        return super().forward(input).contiguous()


def _buckets(kind: str, calls: Mapping[Call, int]) -> dict[int, tuple[Call, int]]:
    """{bucket: (its most frequent call, number of all its calls)}, the most frequent buckets."""
    grouped: dict[int, Counter[Call]] = defaultdict(Counter)
    for call, count in calls.items():
        grouped[bucket_of(rows_of(kind, call.shape))][call] += count
    common = sorted(grouped.items(), key=lambda item: -item[1].total())[:MOST_BUCKETS]
    return {bucket: (held.most_common(1)[0][0], held.total()) for bucket, held in sorted(common)}


def _key(layer: Layer, module: nn.Module, call: Call, bucket: int, threads: int) -> dict[str, Any]:
    """What the times of a layer depend on."""
    moves = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {
        **environment(threads),
        **_weight(layer, module),
        "options": [str(getattr(module, name)) for name in moves if hasattr(module, name)],
        "input": [bucket, *(() if layer.kind == "linear" else call.shape[1:]), call.layout()],
    }


def _weight(layer: Layer, module: nn.Module) -> dict[str, Any]:
    """The part of a key that says which weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return {
        "kind": layer.kind,
        "shape": list(layer.shape),
        "kept": round(layer.nonzeros / max(weight.numel(), 1), 3),
        "pattern": candidates.pattern_of(weight),
        "bias": module.bias is not None,
        "dtype": str(weight.dtype),
    }


def timed(
    key: Mapping[str, Any],
    names: Iterable[str],
    runs: Callable[[], Mapping[str, Callable[[], object]]],
) -> dict[str, float]:
    """Seconds of the names, from the disk, or by the clock and then kept there."""
    seconds = cache.get(key, frozenset(names))
    if seconds is None:
        seconds = interleaved(runs(), budget=LAYER_BUDGET)
        cache.put(key, seconds)
    return seconds


def totals(
    calls: Mapping[Call, int],
    names: Iterable[str],
    key: Callable[[Call], Mapping[str, Any]],
    forms: Callable[[], Mapping[str, nn.Module]],
) -> dict[str, float]:
    """{name: seconds of all calls} of modules that do the same; `forms` makes them when needed."""
    found, made = dict.fromkeys(names, 0.0), functools.cache(forms)

    def runs(call: Call) -> dict[str, Callable[[], Any]]:
        x = call.sample().to(call.dtype)
        return {name: bound(form, x) for name, form in made().items()}

    for call, count in calls.items():
        seconds = timed(key(call), found, functools.partial(runs, call))
        for name in found:
            found[name] += count * seconds[name]
    return found


@functools.cache
def environment(threads: int) -> dict[str, Any]:
    """The part of a key that says where and with what is measured."""
    return {
        "threads": threads,
        "cpu": machine(),
        "cpus": os.cpu_count(),
        "isa": kernels.active_isa(),
        "prunus": [importlib.metadata.version("prunus"), *_build()],
        "torch": torch.__version__,
    }


def _build() -> list[int]:
    """Size and time of the native module: a new build has other times under the same version."""
    spec = importlib.util.find_spec("prunus._native")
    if spec is None or not spec.origin:
        return []
    held = Path(spec.origin).stat()
    return [held.st_size, held.st_mtime_ns]


def channels_last(x: Any) -> Any:
    """The same images with the channels innermost; anything else as it is."""
    if isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def bound(module: nn.Module, x: Any) -> Callable[[], Any]:
    """One call of a module on an input."""
    return lambda: candidates.run(module, x)

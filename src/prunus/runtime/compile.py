"""`compile`: swap in sparse layers where they are measured to win, and nowhere else."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError
from prunus.runtime import blocks, candidates, fuse
from prunus.runtime.candidates import Call, Calls
from prunus.runtime.measure import interleaved, machine, thread_count
from prunus.runtime.plan import DENSE, DIRECT, SPARSE, Layer, Plan, Row
from prunus.runtime.verify import difference, expect_same, same_randomness
from prunus.runtime.weight import PackedWeight
from prunus.sites import unwrap

M = TypeVar("M", bound=nn.Module)
Choose = Callable[[Layer], str]

MARGIN = 1.05
"""A sparse layer must be this many times faster than the dense one to be taken."""
LAYER_BUDGET = 0.15
"""Seconds of measuring per layer and input shape."""
MODEL_BUDGET = 1.0
"""Seconds of measuring the whole model."""
MOST_SHAPES = 4
"""Input shapes per layer that are measured, the most frequent first."""
LAST = "channels_last"
NOTHING = blocks.Fused()


def compile(
    model: nn.Module,
    example_inputs: Any,
    *,
    threads: int | None = None,
    minimum_sparsity: float = 0.25,
    verify: bool = True,
    choose: Choose | None = None,
) -> nn.Module:
    """A copy of the model for inference, with packed layers where they are faster; see `.plan`.

    example_inputs: a tensor, a tuple of positional or a mapping of named inputs, of the shapes that
    will be used. Each nn.Linear and convolution at `minimum_sparsity` or more is timed against its
    packed twin on its real input shapes, then the whole model against the dense one; what does not
    win stays dense. Below that, convolutions of at most four channels per group (depthwise ones
    and first layers) are timed as "direct" against torch's. A model with convolutions takes the
    faster memory format, too. Before that a batch norm that directly follows a layer is folded
    into it and becomes nn.Identity. A packed layer also computes the residual addition and then
    the activation (ReLU, ReLU6, GELU, SiLU) behind it; a module whose forward pass changes by that
    keeps its class but runs a traced one, for arguments as in the example.
    threads: what to measure with (None: torch.get_num_threads()).
    choose(layer) -> "csr", "direct" or "dense" decides instead of the clock; `Plan.choose` is one.
    The copy is in eval mode and its parameters want no gradients; the original is untouched. The
    plan is its attribute `plan` (`prunus_plan` if the model has a `plan` of its own).
    Raises VerificationError where outputs differ, ShapeError for lazy parameters.
    """
    model = unwrap(model)
    _expect_materialised(model)
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueRangeError(f"threads is {threads}, expected at least 1 or None")
    with thread_count(threads), torch.no_grad():
        with same_randomness():
            calls = candidates.record(_assemble(model, {}, share=True), example_inputs)
        base, chains = _folded(model, example_inputs, calls)
        plan, twins = _decide(base, calls, threads, minimum_sparsity, choose)
        swaps = _fused(base, example_inputs, twins, chains)
        swaps, fused = _rewritten(base, example_inputs, swaps)
        if verify and swaps:
            dense = _assemble(model, {}, share=True)
            sparse = _assemble(base, swaps, fused, share=True)
            expect_same(dense, sparse, twins, example_inputs, _assemble(base, {}, share=True))
        if choose is None:
            plan, swaps = _whole(base, example_inputs, plan, swaps, fused)
    fused = fused if swaps else NOTHING
    plan = dataclasses.replace(plan, rows=_annotated(plan.rows, chains, swaps, fused))
    final = _assemble(base, swaps, fused, share=False).requires_grad_(False)
    if plan.layout == LAST:
        final.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    taken = not isinstance(getattr(model, "plan", plan), Plan)
    setattr(final, "prunus_plan" if taken else "plan", plan)
    return final


def _expect_materialised(model: nn.Module) -> None:
    """ShapeError for parameters that have no shape yet."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ShapeError(f"{name!r} has no shape yet; run one batch through the model first")


def _assemble(
    model: M, twins: Mapping[str, nn.Module], fused: blocks.Fused = NOTHING, *, share: bool
) -> M:
    """A copy in eval mode with twins in place of layers, wherever the model refers to them.

    fused: blocks get these forward passes. share: the copy uses the original's parameters, so that
    it costs little memory.
    """
    memo: dict[int, Any] = {id(model.get_submodule(name)): twin for name, twin in twins.items()}
    if share:
        memo.update({id(parameter): parameter for parameter in model.parameters()})
    made = copy.deepcopy(model, memo).eval()
    for name, forward in fused.forwards.items():
        forward.install(made.get_submodule(name))
    return made


def _folded(model: M, example: Any, calls: Calls) -> tuple[M, list[fuse.Chain]]:
    """The model with batch norms folded in, and what follows each layer; as it is if that fails."""
    with same_randomness():
        chains = fuse.chains(_assemble(model, {}, share=True), example, calls)
    swapped = fuse.folded(chains, model)
    if not swapped:
        return model, chains
    base = _assemble(model, swapped, share=True)
    dense = _assemble(model, {}, share=True)
    # A trace may have missed a dependence of the model on its input.
    return (base, chains) if difference(dense, base, example) is None else (model, [])


def _fused(
    model: nn.Module, example: Any, twins: Mapping[str, nn.Module], chains: list[fuse.Chain]
) -> dict[str, nn.Module]:
    """Twins with activations, and nn.Identity in their places; plain twins if that fails."""
    swaps = dict(twins)
    for chain in chains:
        twin = twins.get(chain.layer)
        if chain.activation and isinstance(twin, PackedWeight):
            name = fuse.activation_name(model.get_submodule(chain.activation))
            swaps |= {chain.layer: twin.with_activation(name), chain.activation: nn.Identity()}
    if len(swaps) == len(twins):
        return swaps
    forms = (_assemble(model, {}, share=True), _assemble(model, swaps, share=True))
    return swaps if difference(*forms, example) is None else dict(twins)


def _rewritten(
    model: nn.Module, example: Any, swaps: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], blocks.Fused]:
    """Layers and forward passes with additions and activations fused; as they are if that fails."""
    if not swaps:
        return swaps, NOTHING
    with same_randomness():
        fused = blocks.fuse(_assemble(model, swaps, share=True), example)
    if not fused.forwards:
        return swaps, NOTHING
    found = dict(swaps)
    for name, activation in fused.activations.items():
        layer = swaps[name]
        if isinstance(layer, PackedWeight):
            found[name] = layer.with_activation(activation)
    forms = (_assemble(model, swaps, share=True), _assemble(model, found, fused, share=True))
    return (found, fused) if _same(*forms, example) else (swaps, NOTHING)


def _same(one: nn.Module, other: nn.Module, example: Any) -> bool:
    """Whether two models agree on the example; a rewritten one may refuse its arguments."""
    try:
        return difference(one, other, example) is None
    except fuse.UNTRACEABLE:
        return False


def _annotated(
    rows: tuple[Row, ...],
    chains: list[fuse.Chain],
    swaps: Mapping[str, nn.Module],
    fused: blocks.Fused,
) -> tuple[Row, ...]:
    """The rows with what their layers do besides."""
    norms = {chain.layer for chain in chains if chain.norm}
    done = []
    for row in rows:
        layer = swaps.get(row.name)
        parts = ["batch norm"] if row.name in norms else []
        parts += ["residual"] if row.name in fused.residuals else []
        if isinstance(layer, PackedWeight) and layer.activation:
            parts.append(layer.activation)
        done.append(dataclasses.replace(row, fused=", ".join(parts)))
    return tuple(done)


def _decide(
    model: nn.Module, calls: Calls, threads: int, minimum: float, choose: Choose | None
) -> tuple[Plan, dict[str, nn.Module]]:
    """The plan layer by layer, and {name: sparse twin} of the layers that won."""
    owners = candidates.tied_owners(model)
    rows: list[Row] = []
    twins: dict[str, nn.Module] = {}
    for name, module in candidates.layers_of(model).items():
        layer = candidates.layer_of(name, module)
        reason = candidates.refusal(module, owners, calls[name])
        if reason:
            row = _row(layer, DENSE, reason)
        elif choose is not None:
            row = _row(layer, _chosen(choose, layer), "chosen by the caller")
        elif layer.sparsity < minimum and not candidates.is_direct(module):
            row = _row(layer, DENSE, f"less than {minimum:.0%} sparse")
        elif kernels.active_isa() == kernels.FALLBACK:
            row = _row(layer, DENSE, "no native module: the NumPy kernels are for checking only")
        else:
            choice = DIRECT if layer.sparsity < minimum else SPARSE
            row, twin = _measured(layer, module, calls[name], choice)
            twins.update({} if row.choice == DENSE else {name: twin})
        if row.choice != DENSE and name not in twins:
            twins[name] = candidates.pack_layer(module)
        rows.append(row)
    reason = "as chosen" if choose else "not measured as a whole"
    reason = reason if twins else "no layer runs sparse, the model stays dense"
    return Plan(tuple(rows), threads, kernels.active_isa(), machine(), reason), twins


def _row(
    layer: Layer, choice: str, reason: str, sparse: float | None = None, dense: float | None = None
) -> Row:
    """A row of the plan; times in seconds."""
    facts = (layer.name, layer.kind, layer.shape, layer.sparsity)
    return Row(*facts, choice, reason, sparse, dense)


def _chosen(choose: Choose, layer: Layer) -> str:
    """The caller's choice, checked."""
    choice = choose(layer)
    if choice not in (SPARSE, DIRECT, DENSE):
        raise ValueRangeError(
            f"choose returned {choice!r} for layer {layer.name!r}, expected {SPARSE!r}, {DIRECT!r} "
            f"or {DENSE!r}"
        )
    return choice


def _measured(
    layer: Layer, module: nn.Module, calls: Mapping[Call, int], wanted: str
) -> tuple[Row, nn.Module]:
    """Time a layer against its packed twin; a convolution in both memory formats.

    A direct one stands between packed layers, so torch has to take and give contiguous images.
    """
    twin = candidates.pack_layer(module)
    dense = _assemble(module, {}, share=True)
    runners: dict[str, nn.Module] = {"sparse": twin, "dense": dense}
    if layer.kind == "conv2d":
        last = copy.deepcopy(module).eval()
        runners["channels_last"] = last.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    totals = dict.fromkeys(runners, 0.0)
    frequent = sorted(calls.items(), key=lambda item: -item[1])[:MOST_SHAPES]
    for call, count in frequent:
        x = call.sample()
        inputs = {"sparse": x, "dense": x, "channels_last": _channels_last(x)}
        runs = {name: _bound(runner, inputs[name]) for name, runner in runners.items()}
        if wanted == DIRECT:
            runs["channels_last"] = _bound(_Contiguous(runners["channels_last"]), x.contiguous())
        for name, seconds in interleaved(runs, budget=LAYER_BUDGET).items():
            totals[name] += count * seconds
    best = min((name for name in totals if name != "sparse"), key=totals.__getitem__)
    sparse_seconds, dense_seconds = totals["sparse"], totals[best]
    ratio = dense_seconds / sparse_seconds
    against = "dense" if best == "dense" else f"dense ({best})"
    wins = ratio >= MARGIN
    reason = f"{ratio:.2f}x {against}" + ("" if wins else f", below {MARGIN}x")
    choice = wanted if wins else DENSE
    return _row(layer, choice, reason, sparse_seconds, dense_seconds), twin


class _Contiguous(nn.Sequential):
    """A layer whose images come out contiguous."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run it, then convert."""
        return super().forward(input).contiguous()


def _channels_last(x: Any) -> Any:
    """The same images with the channels innermost; anything else as it is."""
    if isinstance(x, torch.Tensor) and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _bound(module: nn.Module, x: Any) -> Callable[[], Any]:
    """One call of a module on an input."""
    return lambda: candidates.run(module, x)


def _whole(
    model: nn.Module,
    example: Any,
    plan: Plan,
    twins: dict[str, nn.Module],
    fused: blocks.Fused,
) -> tuple[Plan, dict[str, nn.Module]]:
    """Time all forms of the whole; the fastest one is the plan."""
    forms = {"dense": _assemble(model, {}, share=True)}
    forms |= {"sparse": _assemble(model, twins, fused, share=True)} if twins else {}
    if any(row.kind == "conv2d" for row in plan.rows):
        forms |= {f"{name} {LAST}": _in_channels_last(form) for name, form in forms.items()}
    if len(forms) == 1:
        return plan, twins
    runs = {name: _bound(form, example) for name, form in forms.items()}
    with same_randomness():
        return _judged(plan, twins, interleaved(runs, budget=MODEL_BUDGET))


def _in_channels_last(model: M) -> M:
    """A copy whose convolutions hold their weights with the channels innermost."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _judged(
    plan: Plan, twins: dict[str, nn.Module], times: Mapping[str, float]
) -> tuple[Plan, dict[str, nn.Module]]:
    """The plan with whole-model times and the fastest form; every layer dense if sparse lost.

    times: "dense" and "sparse", alone or with " channels_last", to seconds.
    """
    dense = min((name for name in times if name.startswith("dense")), key=times.__getitem__)
    sparse = min((n for n in times if n.startswith("sparse")), key=times.__getitem__, default=None)
    found = dataclasses.replace(plan, dense_seconds=times[dense])
    if sparse is not None:
        found = dataclasses.replace(found, sparse_seconds=times[sparse])
    if sparse is not None and times[sparse] < times[dense]:
        layout = LAST if sparse.endswith(LAST) else ""
        return dataclasses.replace(found, reason=f"faster than {dense}", layout=layout), twins
    layout = LAST if dense.endswith(LAST) else ""
    reason = plan.reason
    if sparse is not None:
        reason = f"slower than {dense} as a whole, so every layer stays dense"
    rows = tuple(
        dataclasses.replace(row, choice=DENSE, reason=f"{row.reason}, but the whole model lost")
        if row.choice != DENSE
        else row
        for row in plan.rows
    )
    return dataclasses.replace(found, rows=rows, reason=reason, layout=layout), {}

"""`compile`: swap in sparse layers where they are measured to win, and nowhere else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from prunus.runtime import (
    blocks,
    candidates,
    chain,
    decoder,
    fastpath,
    fuse,
    networks,
    reach,
    siblings,
    transformer,
)
from prunus.runtime.arguments import checked, taking_examples
from prunus.runtime.assemble import assemble
from prunus.runtime.candidates import Calls
from prunus.runtime.decide import Choose, Options, decide
from prunus.runtime.epilogue import Fusing
from prunus.runtime.forward import Forward
from prunus.runtime.measure import thread_count
from prunus.runtime.plan import Plan, Row
from prunus.runtime.tracing import UNTRACEABLE
from prunus.runtime.verify import TOLERANCES, difference, expect_same, same_randomness
from prunus.runtime.whole import Build, Form, whole
from prunus.sites import unwrap

M = TypeVar("M", bound=nn.Module)

NOTHING = blocks.Fused()


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    threads: int | None = None,
    minimum_sparsity: float = 0.25,
    dtype: torch.dtype = torch.float32,
    duplicate_weights: bool = False,
    verify: bool = True,
    choose: Choose | None = None,
) -> nn.Module:
    """A copy of the model for inference, with packed layers where they are faster; see `.plan`.

    example_inputs: a tensor, a tuple of positional or a mapping of named inputs, of the shapes that
    will be used; a list of these if several sizes will be. Each nn.Linear and convolution at
    `minimum_sparsity` or more is timed against its packed twin on its real input shapes, then the
    whole model against the dense one; what does not win, in sum and on every example, stays dense.
    Below that, convolutions of at most four channels per group are timed as "direct" against
    torch's. Models with convolutions take the faster memory format, too. Before, a batch norm that
    directly follows a layer is folded into it and becomes nn.Identity. A packed layer also computes
    the residual addition and the activation (ReLU, ReLU6, GELU, SiLU) behind it; a module that this
    changes keeps its class but runs a traced forward pass, for arguments as in the example. Packed
    linear layers of one module that read the same tensor become one where that is faster, with
    outputs that are views; those that follow each other become a chain. Beside packed layers
    attention and layer norms run through kernels where that is faster.
    threads: what to measure with (None: torch.get_num_threads()).
    dtype: torch.bfloat16 also allows weights and dense layers in bfloat16, where they win;
    torch.int8 allows weights in int8, too, with one scale per row.
    duplicate_weights: a layer whose fastest way differs between sizes of its input may hold its
    weight once per way; otherwise it takes the best on the whole, and holds the weight once.
    choose(layer) -> "csr", "direct" or "dense" decides instead of the clock; `Plan.choose` is one.
    The copy is in eval mode, without gradients; the original is untouched. Its plan is in `plan`
    (`prunus_plan` if the model has a `plan`). Times of layers are kept on disk in $PRUNUS_CACHE.
    Raises VerificationError where outputs differ, ShapeError for parameters without data,
    ValueRangeError for wrong arguments and examples that the model does not take.
    """
    options = Options(threads or 0, minimum_sparsity, dtype, duplicate_weights, choose)
    options = checked(model, example_inputs, threads, options)
    model, example = unwrap(model), candidates.several(example_inputs)
    with thread_count(options.threads), torch.no_grad():
        with same_randomness(), taking_examples():
            calls = candidates.record(assemble(model, {}, share=True), example)
        base, chains = _folded(model, example, calls)
        base = fastpath.left(base, example)
        plan, twins = decide(base, calls, options)
        swaps = _fused(base, example, twins, chains)
        swaps, fused = _rewritten(base, example, swaps)
        placed = _placed(base, example, swaps, fused.forwards, options)
        linked, chained = chain.link(base, example, placed.swaps, placed.forwards, calls, options)
        merged = siblings.merge(base, example, linked, placed.forwards, calls, options)
        made = functools.partial(_made, base, siblings.Merged(linked, placed.forwards), merged)
        if verify and swaps:
            forms = (assemble(model, {}, share=True), made(Form(True, merged=True)))
            expect_same(*forms, twins, example, assemble(base, {}, share=True), TOLERANCES[dtype])
        plan, form = _form(made, example, plan, options, bool(swaps), bool(merged.groups))
    rows = _annotated(plan.rows, chains, *((swaps, fused) if form.swapped else ({}, NOTHING)))
    plan = _named(dataclasses.replace(plan, rows=rows), form, placed, merged, chained)
    final = form.of(made(form, share=False)).requires_grad_(False)
    setattr(final, _plan_name(model), plan)
    return final


def _placed(
    base: nn.Module,
    example: Any,
    swaps: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward],
    options: Options,
) -> transformer.Placed:
    """What runs through kernels between the layers, and whole modules that do."""
    placed = transformer.place(base, example, swaps, forwards, options)
    found, together = networks.place(base, example, placed.swaps, placed.forwards, options)
    found, decoders = decoder.place(base, example, placed.swaps, found, options)
    return dataclasses.replace(placed, forwards=found, networks=together, decoders=decoders)


def _named(
    plan: Plan,
    form: Form,
    placed: transformer.Placed,
    merged: siblings.Merged,
    chained: tuple[tuple[str, ...], ...],
) -> Plan:
    """The plan with the names of what became one, or runs through other kernels."""
    if not form.swapped:
        return plan
    names = tuple(group.names for group in merged.groups) if form.merged else ()
    return dataclasses.replace(
        plan,
        merged=names,
        chained=chained,
        attentions=placed.attentions,
        norms=placed.norms,
        networks=placed.networks,
        decoders=placed.decoders,
    )


def _plan_name(model: nn.Module) -> str:
    """The attribute for the plan, where the model may have a `plan` of its own."""
    taken = hasattr(model, "plan") and not isinstance(model.plan, Plan)
    return "prunus_plan" if taken else "plan"


def _made(
    base: nn.Module,
    apart: siblings.Merged,
    merged: siblings.Merged,
    form: Form,
    share: bool = True,
) -> nn.Module:
    """The model with what was decided, or dense; not yet in the form's dtype and layout."""
    if not form.swapped:
        return fastpath.taken(assemble(base, {}, share=share))
    taken = merged if form.merged else apart
    model = assemble(base, taken.swaps, taken.forwards, share=share)
    taken.install(model)
    return fastpath.taken(model)


def _form(
    made: Build, example: Any, plan: Plan, options: Options, swaps: bool, merges: bool
) -> tuple[Plan, Form]:
    """The form to take: by the clock, by an older plan, or as the caller chose the layers."""
    narrow = _narrow(made(Form(False)))
    half = options.dtype != torch.float32 and not narrow
    if options.choose is None:
        plan, form = whole(made, example, plan, swaps=swaps, merges=merges, half=half)
        return (dataclasses.replace(plan, dtype="bfloat16") if narrow else plan), form
    old = options.replayed
    if old is None:
        return plan, Form(swaps)
    form = Form(swaps, half and old.dtype == "bfloat16", bool(old.layout), merges)
    dtype = "bfloat16" if form.half or narrow else "float32"
    return dataclasses.replace(plan, layout=old.layout, dtype=dtype), form


def _narrow(model: nn.Module) -> bool:
    """Whether all of a model's weights are in bfloat16 already."""
    held = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return held == {torch.bfloat16}


def _folded(model: M, example: Any, calls: Calls) -> tuple[M, list[fuse.Chain]]:
    """The model with batch norms folded in, and what follows each layer; as it is if that fails."""
    with same_randomness():
        chains = fuse.chains(assemble(model, {}, share=True), example, calls)
        groups = [tuple(filter(None, dataclasses.astuple(found))) for found in chains]
        sure = reach.together(assemble(model, {}, share=True), groups, example)
    chains = [found for found, good in zip(chains, sure, strict=True) if good]
    swapped = fuse.folded(chains, model)
    if not swapped:
        return model, chains
    base = assemble(model, swapped, share=True)
    dense = assemble(model, {}, share=True)
    # A trace may have missed a dependence of the model on its input.
    return (base, chains) if difference(dense, base, example) is None else (model, [])


def _fused(
    model: nn.Module, example: Any, twins: Mapping[str, nn.Module], chains: list[fuse.Chain]
) -> dict[str, nn.Module]:
    """Twins with activations, and nn.Identity in their places; plain twins if that fails."""
    swaps = dict(twins)
    for found in chains:
        twin = twins.get(found.layer)
        if found.activation and isinstance(twin, Fusing):
            name = fuse.activation_name(model.get_submodule(found.activation))
            swaps |= {found.layer: twin.with_activation(name), found.activation: nn.Identity()}
    if len(swaps) == len(twins):
        return swaps
    forms = (assemble(model, {}, share=True), assemble(model, swaps, share=True))
    return swaps if difference(*forms, example) is None else dict(twins)


def _rewritten(
    model: nn.Module, example: Any, swaps: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], blocks.Fused]:
    """Layers and forward passes with additions and activations fused; as they are if that fails."""
    if not swaps:
        return swaps, NOTHING
    with same_randomness():
        fused = blocks.fuse(assemble(model, swaps, share=True), example)
    if not fused.forwards:
        return swaps, NOTHING
    found = dict(swaps)
    for name, activation in fused.activations.items():
        layer = swaps.get(name, model.get_submodule(name))
        if isinstance(layer, Fusing):
            found[name] = layer.with_activation(activation)
    forms = (assemble(model, swaps, share=True), assemble(model, found, fused.forwards, share=True))
    return (found, fused) if _same(*forms, example) else (swaps, NOTHING)


def _same(one: nn.Module, other: nn.Module, example: Any) -> bool:
    """Whether two models agree on the example; a rewritten one may refuse its arguments."""
    try:
        return difference(one, other, example) is None
    except UNTRACEABLE:
        return False


def _annotated(
    rows: tuple[Row, ...],
    chains: list[fuse.Chain],
    swaps: Mapping[str, nn.Module],
    fused: blocks.Fused,
) -> tuple[Row, ...]:
    """The rows with what their layers do besides."""
    norms = {found.layer for found in chains if found.norm}
    done = []
    for row in rows:
        layer = swaps.get(row.name)
        parts = ["batch norm"] if row.name in norms else []
        parts += ["residual"] if row.name in fused.residuals else []
        if isinstance(layer, Fusing) and layer.activation:
            parts.append(layer.activation)
        done.append(dataclasses.replace(row, fused=", ".join(parts)))
    return tuple(done)

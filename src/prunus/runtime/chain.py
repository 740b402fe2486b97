"""Sparse linear layers that directly follow each other, run one panel of tokens at a time.

`prunus::sparse_chain`: y[..., M] of several layers x W^T + bias, each with its activation; the last
one also adds a residual before its own. Between the layers a panel of tokens keeps the kernels'
layout and stays in the cache.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError
from prunus.runtime import blocks, candidates, reach
from prunus.runtime.assemble import assemble
from prunus.runtime.candidates import Calls
from prunus.runtime.decide import Options, bucket_of, environment, rows_of, totals
from prunus.runtime.epilogue import addable
from prunus.runtime.forward import Forward
from prunus.runtime.modules import SparseLinear
from prunus.runtime.ops import blob_array
from prunus.runtime.tracing import UNTRACEABLE
from prunus.runtime.verify import difference
from prunus.runtime.weight import transformed

MARGIN, REPACKED = 1.05, 1.1
"""Chained layers must be this many times faster than apart, and where some of them leave csr."""
CHAINED, APART = "chained", "apart"


def chain_rows(
    x: Tensor,
    packed: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outputs: int,
    flags: Sequence[int],
    residual: Tensor | None,
) -> Tensor:
    """Call the kernels on contiguous fp32 x [..., K]; a new [..., outputs]. Checks nothing."""
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel():
        kernels.chain_ptr(
            [blob.data_ptr() for blob in packed],
            [0 if bias is None else bias.data_ptr() for bias in biases],
            list(flags),
            x.data_ptr(),
            y.data_ptr(),
            y.numel() // outputs,
            torch.get_num_threads(),
            -1,
            0 if residual is None else residual.data_ptr(),
        )
    return y


@torch.library.custom_op(
    "prunus::sparse_chain",
    mutates_args=(),
    schema="(Tensor x, Tensor[] packed, Tensor?[] biases, int out_features, str[] activations, "
    "Tensor? residual=None) -> Tensor",
)
def sparse_chain(
    x: Tensor,
    packed: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    out_features: int,
    activations: Sequence[str],
    residual: Tensor | None = None,
) -> Tensor:
    """The layers one after another; fp32 on the CPU, without gradients."""
    heads = [kernels.info(blob_array(blob)) for blob in packed]
    if len(heads) < 2 or not len(heads) == len(biases) == len(activations):
        raise ValueRangeError("a chain takes two or more layers, each with a bias or none")
    if x.dtype != torch.float32 or not x.is_cpu:
        raise ValueRangeError(f"x is {x.dtype} on {x.device}; the operator takes CPU torch.float32")
    widths = [x.shape[-1], *(head.rows for head in heads)]
    if widths[:-1] != [head.cols for head in heads] or widths[-1] != out_features:
        raise ShapeError(f"layers of {[(h.rows, h.cols) for h in heads]} do not make a chain")
    for bias, head in zip(biases, heads, strict=True):
        if bias is not None and (bias.dtype, *bias.shape) != (torch.float32, head.rows):
            raise ShapeError(f"a bias is {bias.dtype} {list(bias.shape)}, expected [{head.rows}]")
    if residual is not None and not addable(x, residual, (*x.shape[:-1], out_features)):
        raise ShapeError(f"residual has shape {list(residual.shape)}, unlike the output")
    kept = [None if bias is None else bias.contiguous() for bias in biases]
    flags = [kernels.ACTIVATIONS[name] for name in activations]
    added = None if residual is None else residual.contiguous()
    return chain_rows(x.contiguous(), packed, kept, out_features, flags, added)


@sparse_chain.register_fake
def _(x, packed, biases, out_features, activations, residual=None):
    return x.new_empty((*x.shape[:-1], out_features))


class SparseChain(nn.Module):
    """Sparse linear layers in tiles, applied one after another to fp32 input [..., K].

    Inputs in half precision and inputs that want gradients pass the layers one by one, as they do
    where a layer has hooks.
    """

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        """Take two or more layers that fit each other; ShapeError where they do not."""
        super().__init__()
        for one, other in itertools.pairwise(layers):
            if one.out_features != other.in_features:
                raise ShapeError(
                    f"a layer of {one.out_features} outputs does not fit {other.in_features} inputs"
                )
        if len(layers) < 2:
            raise ValueRangeError("a chain takes two or more layers")
        self.layers = nn.ModuleList(in_tiles(layer) for layer in layers)
        self.in_features, self.out_features = layers[0].in_features, layers[-1].out_features
        self.eval()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map input [..., in_features]; the residual joins the last layer before its activation."""
        x = input
        # Dictionaries of modules and buffers: attributes would cost microseconds in every call.
        held = cast(nn.ModuleList, self._modules["layers"])._modules
        layers = [cast(SparseLinear, layer) for layer in held.values()]
        biases = [layer._buffers["bias"] for layer in layers]
        watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
        if watched or transformed() or not self._chainable(x, biases, residual):
            for layer in layers[:-1]:
                x = layer(x)
            return layers[-1](x, residual)
        packed = [cast(Tensor, layer._buffers["packed"]) for layer in layers]
        if layers[0]._direct(x, None, residual):
            flags = [kernels.ACTIVATIONS[layer.activation] for layer in layers]
            added = None if residual is None else residual.contiguous()
            return chain_rows(x.contiguous(), packed, biases, self.out_features, flags, added)
        names = [layer.activation for layer in layers]
        return torch.ops.prunus.sparse_chain(x, packed, biases, self.out_features, names, residual)

    def _chainable(
        self, x: Tensor, biases: Sequence[Tensor | None], residual: Tensor | None
    ) -> bool:
        """Whether the operator takes these; what it refuses, the layers themselves judge."""
        wanted = [tensor for tensor in (x, *biases, residual) if tensor is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted):
            return False
        for tensor in wanted:
            if tensor.dtype != torch.float32 or not tensor.is_cpu:
                return False
        if (
            x.shape[-1:] != (self.in_features,)
            or not cast(SparseLinear, self.layers[0]).packed.is_cpu
        ):
            return False
        return residual is None or addable(x, residual, (*x.shape[:-1], self.out_features))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def in_tiles(layer: SparseLinear) -> SparseLinear:
    """The layer with its weight in tiles; itself if it is."""
    if layer.kind == "tiled_f32":
        return layer
    blob = torch.from_numpy(kernels.tile(blob_array(layer.packed)))
    tiled = SparseLinear(blob, layer.bias)
    tiled.weight_dtype = layer.weight_dtype
    return cast(SparseLinear, tiled.with_activation(layer.activation))


def link(
    base: nn.Module,
    example: Any,
    swaps: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward],
    calls: Calls,
    options: Options,
) -> tuple[dict[str, nn.Module], tuple[tuple[str, ...], ...]]:
    """(swaps, names of each chain): chains in the places of their last layers where they win.

    A chain's other layers become nn.Identity. Found by watching a forward pass, and taken where the
    code of the module that holds them says that nothing ever comes between (`_surely`). An older
    plan's chains are taken without the clock.
    """
    old = options.replayed
    if not swaps or (options.choose is not None and old is None):
        return dict(swaps), ()
    model = assemble(base, swaps, forwards, share=True)
    found, kept = dict(swaps), []
    for names in _surely(model, example, forwards):
        layers = [swaps.get(name) for name in names]
        packed = [layer for layer in layers if isinstance(layer, SparseLinear)]
        if len(packed) < len(names) or (old is not None and names not in old.chained):
            continue
        if old is None and not _faster(packed, calls[names[0]], options.threads):
            continue
        trial = found | dict.fromkeys(names[:-1], nn.Identity()) | {names[-1]: SparseChain(packed)}
        if _same(model, assemble(base, trial, forwards, share=True), example):
            found, kept = trial, [*kept, names]
    return found, tuple(kept)


def _surely(
    model: nn.Module, example: Any, forwards: Mapping[str, Forward]
) -> list[tuple[str, ...]]:
    """Runs of layers of which each reads what the one before returns, whatever the input."""
    follows = neighbours(model, example)
    owners = {pair: reach.owner_of(pair) for pair in follows.items()}
    modules = {owner: model.get_submodule(owner) for owner in set(owners.values())}
    given = reach.arguments_of(model, modules, example)
    sure = {}
    for (one, other), owner in owners.items():
        module = modules[owner]
        # A forward pass that was rewritten takes no other arguments.
        free = owner not in forwards and (
            reach.varied(module, given[owner]) or reach.steered(module)
        )
        start = len(owner) + 1 if owner else 0
        if (
            not free
            and reach.hidden(model, owner, (one, other))
            and _wired(module, one[start:], other[start:], given[owner])
        ):
            sure[one] = other
    return list(_runs(sure))


def _wired(owner: nn.Module, one: str, other: str, given: set[frozenset[str] | None]) -> bool:
    """Whether in the graph of a forward pass one layer feeds nothing but the other."""
    graph = blocks.trace_with(owner, given)
    if graph is None:
        return False
    modules = dict(owner.named_modules(remove_duplicate=False))
    starts = [node for node in graph.nodes if node.op == "call_module" and node.target == one]
    if len(starts) != 1:
        return False
    (node,) = starts
    while len(node.users) == 1:
        (user,) = node.users
        besides = (*user.args[1:], *user.kwargs.values())
        if user.op != "call_module" or user.args[:1] != (node,) or node in besides:
            return False
        if user.target == other:
            return True
        if type(modules[str(user.target)]) not in _TRANSPARENT:
            return False
        node = user
    return False


_TRANSPARENT = (nn.Identity, nn.Dropout)
_TILEABLE = ("csr_f32", "tiled_f32")


def neighbours(model: nn.Module, example: Any) -> dict[str, str]:
    """{layer: the one that alone read its output}, among sparse linear layers."""
    watched = {
        name: module
        for name, module in model.named_modules()
        if name and type(module) is SparseLinear and module.kind in _TILEABLE
    }
    made: dict[int, tuple[str, Tensor]] = {}
    counts, pairs, adding = Counter[str](), Counter[tuple[str, str]](), set[str]()

    def reader(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = args[0] if args else named["input"]
            counts[name] += 1
            if len(args) + len(named) > 1:
                adding.add(name)
            if id(x) in made:
                pairs[made[id(x)][0], name] += 1

        return hook

    def writer(name: str):
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            made[id(output)] = (name, output)  # held, so that no other gets its id

        return hook

    handles = []
    for name, module in watched.items():
        handles.append(module.register_forward_pre_hook(reader(name), with_kwargs=True))
        handles.append(module.register_forward_hook(writer(name)))
    try:
        candidates.run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {
        one: other
        for (one, other), count in pairs.items()
        if count == counts[one] == counts[other] and one not in adding
    }


def _runs(follows: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """The longest sequences."""
    for first in follows:
        if first in follows.values():
            continue
        names = [first]
        while names[-1] in follows:
            names.append(follows[names[-1]])
        yield tuple(names)


class _Apart(nn.Module):
    """The layers one after another, as the model calls them."""

    def __init__(self, layers: Sequence[SparseLinear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        for layer in self.layers:
            x = layer(x)
        return x


def _faster(
    layers: Sequence[SparseLinear], calls: Mapping[candidates.Call, int], threads: int
) -> bool:
    """Whether the chain wins on the inputs of its first layer, by the disk or the clock."""

    def key(call: candidates.Call) -> dict[str, Any]:
        return {
            **environment(threads),
            "kind": "chain",
            "input": [bucket_of(rows_of("linear", call.shape)), call.layout()],
            "layers": [
                {
                    "shape": list(layer.weight_shape),
                    "kept": round(1 - layer.sparsity, 3),
                    "kind": [layer.kind, layer.activation],
                }
                for layer in layers
            ],
        }

    def forms() -> dict[str, nn.Module]:
        return {CHAINED: SparseChain(layers), APART: _Apart(layers)}

    seconds = totals(calls, (CHAINED, APART), key, forms)
    margin = MARGIN if all(layer.kind == "tiled_f32" for layer in layers) else REPACKED
    return seconds[APART] >= margin * seconds[CHAINED]


def _same(apart: nn.Module, chained: nn.Module, example: Any) -> bool:
    """Whether both compute the same; a model may refuse what comes out of a chain."""
    try:
        return difference(apart, chained, example) is None
    except UNTRACEABLE:
        return False

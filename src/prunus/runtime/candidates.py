"""The ways to run a layer, which layers may take them, and what their inputs look like."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import ShapeError
from prunus.runtime.conv1d import SparseConv1d
from prunus.runtime.dense import DenseLayer
from prunus.runtime.epilogue import Fusing
from prunus.runtime.groups import grouped_layer, grouping_of
from prunus.runtime.modules import SparseConv2d, SparseLinear
from prunus.runtime.nm import nm_layer, suits_nm
from prunus.runtime.plan import (
    BITMAP,
    BITMAP_BF16,
    BITMAP_INT8,
    DENSE_BF16,
    DIRECT,
    GROUPS,
    NM,
    SPARSE,
    TILED,
    Layer,
)

KINDS = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d"}
ALL = frozenset(KINDS.values())
LINEAR = frozenset({"linear"})
DIRECT_CHANNELS = 4
"""Channels per group up to which a dense convolution is tried through the packed kernels."""
PRECISIONS = (torch.float32, torch.bfloat16, torch.int8)
"""What weights may be rounded to; each allows those before it."""
WIDENED = (torch.float32, torch.bfloat16)
"""What weights and inputs may be in; kernels compute in fp32."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a layer, measured against torch's own; a row of TABLE.

    name: the word in plans and for `choose`. build: the layer as a module that owns its weight.
    fits: whether it can run this layer. sparse: its time follows the sparsity. dtype: what its
    weights are rounded to, which the caller of `compile` has to allow. margin: how many times
    faster than csr a sparse way has to be to be taken in its place.
    """

    name: str
    kinds: frozenset[str]
    build: Callable[[nn.Module], Fusing]
    fits: Callable[[nn.Module], bool] = lambda module: True
    sparse: bool = True
    dtype: torch.dtype = torch.float32
    margin: float = 1.0


# One row per way. The first sparse one that is no slower than the others is taken.
TABLE = (
    Candidate(SPARSE, ALL, lambda module: pack_layer(module)),
    # Tiles lose to csr on fewer columns of X than the example has, down to 0.7x on a single one.
    Candidate(TILED, LINEAR, lambda module: packed_layer(module, "tiled_f32"), margin=1.1),
    Candidate(BITMAP, LINEAR, lambda module: packed_layer(module, "bitmap_f32")),
    Candidate(
        BITMAP_BF16,
        LINEAR,
        lambda module: packed_layer(module, "bitmap_bf16"),
        dtype=torch.bfloat16,
    ),
    Candidate(
        BITMAP_INT8,
        LINEAR,
        lambda module: packed_layer(module, "bitmap_i8"),
        fits=lambda module: is_finite(module.weight),
        dtype=torch.int8,
    ),
    Candidate(
        DIRECT,
        ALL - LINEAR,
        lambda module: pack_layer(module),
        fits=lambda module: is_direct(module),
        sparse=False,
    ),
    Candidate(
        GROUPS,
        LINEAR,
        lambda module: grouped_layer(module),
        fits=lambda module: grouping_of(module) is not None,
    ),
    Candidate(
        f"{GROUPS} bf16",
        LINEAR,
        lambda module: grouped_layer(module, torch.bfloat16),
        fits=lambda module: grouping_of(module) is not None,
        dtype=torch.bfloat16,
    ),
    Candidate(
        f"{GROUPS} int8",
        LINEAR,
        lambda module: grouped_layer(module, torch.int8),
        fits=lambda module: grouping_of(module) is not None and is_finite(module.weight),
        dtype=torch.int8,
    ),
    Candidate(NM, LINEAR, lambda module: nm_layer(module), fits=lambda module: suits_nm(module)),
    Candidate(
        f"{NM} bf16",
        LINEAR,
        lambda module: nm_layer(module, torch.bfloat16),
        fits=lambda module: suits_nm(module),
        dtype=torch.bfloat16,
    ),
    Candidate(
        DENSE_BF16,
        ALL,
        lambda module: dense_layer(module, torch.bfloat16),
        fits=lambda module: module.weight.dtype != torch.bfloat16,
        sparse=False,
        dtype=torch.bfloat16,
    ),
)


def ways_of(layer: Layer, module: nn.Module, dtype: torch.dtype) -> dict[str, Candidate]:
    """{name: row} of what can run this layer with weights of this precision, or better.

    A layer in bfloat16 loses nothing by ways that round to it.
    """
    own = module.weight.dtype
    reach = max(PRECISIONS.index(known) for known in (dtype, own) if known in PRECISIONS)
    allowed = PRECISIONS[: reach + 1]
    return {
        way.name: way
        for way in TABLE
        if layer.kind in way.kinds and way.dtype in allowed and way.fits(module)
    }


@dataclasses.dataclass(frozen=True)
class Call:
    """What one input of a layer looked like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def sample(self) -> Tensor:
        """A random tensor of this shape, dtype and, where elements do not overlap, strides."""
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(self.shape, generator=generator, device="cpu").to(self.dtype)
        overlapping = any(
            stride == 0 and size > 1 for size, stride in zip(self.shape, self.stride, strict=True)
        )
        if overlapping:
            return values
        strided = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="cpu")
        return strided.copy_(values)

    def layout(self) -> str:
        """A word for the strides, as far as a time depends on them."""
        like = torch.empty_strided(self.shape, self.stride, device="meta")
        if like.is_contiguous():
            return "contiguous"
        last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
        return "channels_last" if last else str(self.stride)


Calls = Mapping[str, "collections.Counter[Call]"]


def run(model: nn.Module, example: Any) -> Any:
    """Call the model on a tensor, a tuple of positional or a mapping of named inputs.

    A list holds several examples; their outputs come back as a list.
    """
    if isinstance(example, list):
        return [run(model, one) for one in example]
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def several(example: Any) -> Any:
    """The example, or the list of them where there is more than one."""
    return example[0] if isinstance(example, list) and len(example) == 1 else example


def first_of(example: Any) -> Any:
    """The first of several examples, or the only one."""
    return example[0] if isinstance(example, list) else example


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """{first name: module} of every linear layer, 1-d and 2-d convolution, subclasses too."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, tuple(KINDS))
    }


def is_direct(module: nn.Module) -> bool:
    """Whether the packed kernels may beat torch on a dense layer: convolutions of few channels."""
    few = (
        isinstance(module, (nn.Conv1d, nn.Conv2d))
        and module.in_channels // module.groups <= DIRECT_CHANNELS
    )
    return few and type(module) in KINDS


def kind_of(module: nn.Module) -> str:
    """The word for a layer in plans."""
    return next(kind for parent, kind in KINDS.items() if isinstance(module, parent))


def record(model: nn.Module, example: Any, modules: Mapping[str, nn.Module] | None = None) -> Calls:
    """{name: counted calls} of one forward pass, of the layers or of other modules of the model."""
    calls: dict[str, collections.Counter[Call]] = {}
    handles = []
    for name, module in (layers_of(model) if modules is None else modules).items():
        counter = calls.setdefault(name, collections.Counter())
        handles.append(module.register_forward_pre_hook(_recorder(counter), with_kwargs=True))
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _recorder(counter: collections.Counter[Call]):
    """A pre-hook that counts what comes in."""

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named.get("input")
        if isinstance(x, Tensor):
            counter[Call(tuple(x.shape), tuple(x.stride()), x.dtype)] += 1

    return hook


def layer_of(name: str, module: nn.Module) -> Layer:
    """The facts about a layer that a choice may look at."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ShapeError(f"layer {name!r} has no weight tensor")
    kept = int(weight.count_nonzero()) if weight.device.type != "meta" else weight.numel()
    sparsity = 1.0 - kept / weight.numel() if weight.numel() else 0.0
    return Layer(name, kind_of(module), tuple(weight.shape), sparsity, kept)


def tied_owners(model: nn.Module) -> dict[int, list[str]]:
    """{id(parameter): names of the modules that own it}."""
    owners: dict[int, list[str]] = collections.defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name or "(model)")
    return owners


def tied_outputs(model: nn.Module) -> frozenset[str]:
    """Names of linear layers that share their weight with embeddings only, which look rows up.

    Such a layer may have a packed copy: the embedding reads a row for each token, it reads all.
    """
    owners = tied_owners(model)
    modules = dict(model.named_modules())
    names = set[str]()
    for shared in owners.values():
        linear = [name for name in shared if isinstance(modules.get(name), nn.Linear)]
        tables = [name for name in shared if type(modules.get(name)) is nn.Embedding]
        if len(linear) == 1 and len(tables) == len(shared) - 1 > 0:
            names.update(linear)
    return frozenset(names)


def refusal(
    module: nn.Module,
    owners: Mapping[int, list[str]],
    calls: Mapping[Call, int],
    tied: bool = False,
) -> str:
    """Why a layer must stay dense; "" if it may run sparse.

    tied: a packed copy of a shared weight is allowed.
    """
    weight = module._parameters.get("weight")
    reason = ""
    if type(module) not in KINDS:
        reason = f"{type(module).__name__} is not exactly {_plain(module)}"
    elif weight is None:
        reason = "its weight is computed from other parameters"
    elif "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        reason = "it has forward hooks of its own"
    elif weight.device.type != "cpu" or weight.dtype not in WIDENED:
        reason = (
            f"its weight is {weight.dtype} on {weight.device}, "
            f"kernels take float32 and bfloat16 on the CPU"
        )
    elif len(owners.get(id(weight), ())) > 1 and not tied:
        reason = f"its weight is shared by {', '.join(owners[id(weight)])}"
    elif weight.numel() == 0:
        reason = "its weight is empty"
    elif not calls:
        reason = "the example never reached it"
    elif any(call.dtype != weight.dtype for call in calls):
        reason = f"its input is {next(c.dtype for c in calls if c.dtype != weight.dtype)}"
    return reason


def _plain(module: nn.Module) -> str:
    """The torch class that a subclass extends."""
    return next(f"nn.{kind.__name__}" for kind in KINDS if isinstance(module, kind))


def pack_layer(module: nn.Module) -> SparseLinear | SparseConv1d | SparseConv2d:
    """The packed twin of a layer."""
    if isinstance(module, nn.Conv1d):
        return SparseConv1d.from_dense(module)
    if isinstance(module, nn.Conv2d):
        return SparseConv2d.from_dense(module)
    if isinstance(module, nn.Linear):
        return SparseLinear.from_dense(module)
    raise ShapeError(f"{type(module).__name__} has no sparse twin")


def packed_layer(module: nn.Module, kind: str) -> SparseLinear:
    """The packed twin of a linear layer; kind as in kernels.pack."""
    assert isinstance(module, nn.Linear)
    return SparseLinear.from_dense(module, kind)


def is_finite(weight: Any) -> bool:
    """Whether no weight is NaN or infinite, which int8 cannot hold."""
    return bool(torch.isfinite(weight).all())


def dense_layer(module: nn.Module, dtype: torch.dtype | None = None) -> DenseLayer:
    """The layer with a weight of its own, in this dtype if one is given."""
    assert isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))
    return DenseLayer(module, module.weight.dtype if dtype is None else dtype)


def pattern_of(weight: Tensor) -> dict[str, float]:
    """What a kernel's time may depend on besides the number of non-zeros, coarsely.

    Shares of vectors of 4 and 16 rows, of 4 columns, of rows and of columns that hold a non-zero,
    and the fullest row against the mean.
    """
    kept = weight.detach().reshape(weight.shape[0], -1) != 0
    rows = kept.sum(1)
    mean = max(float(rows.double().mean()), 1e-9)
    return {
        "vector4": _share(kept, 4),
        "vector16": _share(kept, 16),
        "run4": _share(kept.t(), 4),
        "rows": round(float((rows > 0).double().mean()), 2),
        "columns": round(float(kept.any(0).double().mean()), 2),
        "fullest": round(float(rows.max()) / mean, 0),
    }


def _share(kept: Tensor, size: int) -> float:
    """Share of groups of `size` rows in a column that hold anything; a rest is left out."""
    whole = kept[: len(kept) // size * size].reshape(-1, size, kept.shape[1])
    return round(float(whole.any(1).double().mean()), 2) if whole.numel() else 1.0

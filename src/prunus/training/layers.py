"""Layers whose parameter is the packed vector of their non-zero weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunus import rng
from prunus.arguments import check_sparsity
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.training.functions import ConvolutionStep, LinearStep, Outer, Way
from prunus.training.pattern import Pattern
from prunus.training.window import Pair, Window

_INDEX = ("offsets", "columns")
_FORWARD = "forward_set"


class SparseWeight(nn.Module):
    """A weight [M, ...] that is stored as `values` [nnz], a parameter, and a Pattern.

    Gradients and optimizer moments have nnz elements. `state_dict` holds values, row offsets
    (int32) and columns (the bits of uint16 in int16); loading takes the topology with it, also one
    with another number of non-zeros (then load before making the optimizer).
    watch, active: who is shown the gradients, and the activities, of the dense weight by rows.
    native: False computes in torch with blocks of rows made dense, which wins at low sparsity.
    forward_set: bool [nnz], what the forward pass uses and `to_dense` keeps (None: all that is
    stored); the rest learns beside it, as in Top-KAST.
    """

    free_sizes = ("values", "columns")
    """What `load` may find with another number of elements than the layer has."""
    optional_state = (_FORWARD,)
    """What a state dict may hold or not."""

    values: nn.Parameter
    bias: nn.Parameter | None
    topology: Tensor

    def __init__(
        self, pattern: Pattern, values: Tensor, bias: Tensor | None, shape: tuple[int, ...]
    ) -> None:
        """values: [nnz], in the pattern's order; shape: of the dense weight, [M, ...]."""
        super().__init__()
        if pattern.shape != (shape[0], math.prod(shape[1:])) or values.shape != (pattern.nnz,):
            raise ShapeError(
                f"{values.numel()} values and a {pattern.shape} pattern of {pattern.nnz} "
                f"non-zeros do not make a weight {list(shape)}"
            )
        # Whoever averages or copies buffers beside parameters brings another topology's along.
        self.register_buffer("topology", pattern.key.clone(), persistent=False)
        self.pattern = pattern
        self.shape = tuple(shape)
        self.values = nn.Parameter(values.detach().clone().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.native = True
        self.watch: Callable[[Outer], None] | None = None
        self.active: Callable[[Outer], None] | None = None
        self.forward_set: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not watched."""
        return {**self.__dict__, "watch": None, "active": None}

    @property
    def pattern(self) -> Pattern:
        """Where the weights are."""
        return self._pattern

    @pattern.setter
    def pattern(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self.topology.copy_(pattern.key)

    @property
    def nonzeros(self) -> int:
        """Stored weights."""
        return self.pattern.nnz

    @property
    def sparsity(self) -> float:
        """Fraction of the weight that is not stored."""
        return 1.0 - self.pattern.nnz / max(1, math.prod(self.shape))

    def dense_weight(self) -> Tensor:
        """The dense weight, made anew, detached."""
        flat = self.values.new_zeros(math.prod(self.shape), requires_grad=False)
        flat[self.pattern.places().to(flat.device)] = self._way().used(self.values.detach())
        return flat.view(self.shape)

    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True = stored and in the forward set."""
        flat = torch.zeros(math.prod(self.shape), dtype=torch.bool)
        flat[self.pattern.places()] = True if self.forward_set is None else self.forward_set
        return flat.view(self.shape)

    def sparse_counts(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """{parameter: (dense shape, non-zeros)} of the dense layer that this one stands for."""
        used = self.nonzeros if self.forward_set is None else int(self.forward_set.sum())
        counts = {"weight": (self.shape, used)}
        if self.bias is not None:
            counts["bias"] = (tuple(self.bias.shape), int(self.bias.count_nonzero()))
        return counts

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Add the index to the parameters."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}offsets"] = self.pattern.offsets.clone()
        destination[f"{prefix}columns"] = self.pattern.columns.clone()
        if self.forward_set is not None:
            destination[f"{prefix}{_FORWARD}"] = self.forward_set.clone()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Check and take the index, then the parameters; a wrong index changes nothing."""
        names = ("local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs")
        given = {**dict(zip(names, rest, strict=False)), **named}
        held = {name: state_dict.get(f"{prefix}{name}") for name in (*_INDEX, "values")}
        if any(held[name] is not None for name in _INDEX):
            try:
                for name, each in held.items():
                    if not isinstance(each, Tensor):
                        raise FormatError(f"{name} is {type(each).__name__}, not a tensor")
                offsets, columns, values = (torch.as_tensor(each) for each in held.values())
                chosen = state_dict.get(f"{prefix}{_FORWARD}")
                self._take(Pattern(self.pattern.shape, offsets, columns), values, chosen)
            except FormatError as error:
                given["error_msgs"].append(f"{prefix}values: {error}")
                return
        elif given["strict"]:
            given["missing_keys"] += [
                f"{prefix}{n}" for n in _INDEX if f"{prefix}{n}" not in state_dict
            ]
        index = {f"{prefix}{name}" for name in (*_INDEX, _FORWARD)}
        plain = {name: value for name, value in state_dict.items() if name not in index}
        super()._load_from_state_dict(plain, prefix, *given.values())

    def _take(self, pattern: Pattern, values: Tensor, chosen: Tensor | None) -> None:
        """Replace the topology; FormatError if the values do not fit it."""
        if values.shape != (pattern.nnz,):
            raise FormatError(f"values {list(values.shape)} for {pattern.nnz} places")
        if chosen is not None and (chosen.shape != values.shape or chosen.dtype != torch.bool):
            raise FormatError(f"a forward set of {chosen.numel()} for {pattern.nnz} places")
        self.pattern, self.forward_set = pattern, None if chosen is None else chosen.clone()
        if self.values.shape != values.shape:
            self.values.grad = None
            self.values.data = self.values.detach().new_zeros(values.shape)

    def _way(self) -> Way:
        """How to compute; FormatError where the values are those of another topology."""
        _check_topology(self)  # pyright: ignore[reportCallIssue]
        return Way(self.pattern, self.native, self.watch, self.forward_set)

    def _tell(self, x: Tensor, y: Tensor, window: Window | None = None) -> None:
        if self.active is not None and torch.is_grad_enabled():
            _call(self.active, Outer(x.detach(), y.detach(), window, (True, True)))  # pyright: ignore[reportCallIssue]


class TrainableLinear(SparseWeight):
    """y [..., out] = x [..., in] W^T + bias with W sparse, for training."""

    def __init__(self, pattern: Pattern, values: Tensor, bias: Tensor | None = None) -> None:
        """See SparseWeight."""
        super().__init__(pattern, values, bias, pattern.shape)
        self.out_features, self.in_features = pattern.shape

    @classmethod
    def random(
        cls, in_features: int, out_features: int, sparsity: float, bias: bool = True, seed: int = 0
    ) -> TrainableLinear:
        """Make a layer of random places without ever making it dense.

        Values are uniform within 1 / sqrt(kept inputs per output), as nn.Linear's are within
        1 / sqrt(inputs). Raises ValueRangeError, ShapeError.
        """
        if min(in_features, out_features) < 1:
            raise ShapeError(f"a layer from {in_features} to {out_features} features is none")
        size = in_features * out_features
        places = distinct(size, round((1 - check_sparsity(sparsity)) * size), ("places", seed))
        pattern = Pattern.of((out_features, in_features), places)
        bound = 1 / math.sqrt(max(1.0, pattern.nnz / max(1, out_features)))
        values = rng.uniform(("values", seed), (pattern.nnz,)).mul_(2).sub_(1).mul_(bound)
        offset = rng.uniform(("bias", seed), (out_features,)).mul_(2).sub_(1).mul_(bound)
        return cls(pattern, values, offset if bias else None)

    @classmethod
    def from_dense(cls, module: nn.Linear, mask: Tensor | None = None) -> TrainableLinear:
        """Take the kept weights of a dense layer; mask: bool [out, in], None: the non-zeros."""
        pattern, values = _packed(module.weight, mask)
        return _learning(cls(pattern, values, module.bias), module)

    def to_dense(self) -> nn.Linear:
        """The same layer as nn.Linear with zeros."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _filled(dense, self)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]; ShapeError where the width differs."""
        _check_input(input)
        if input.shape[-1:] != (self.in_features,):
            raise ShapeError(f"input is {list(input.shape)}, not [..., {self.in_features}]")
        flat = input.reshape(-1, self.in_features)
        y = _linear(flat, self.values, self.bias, self._way())  # pyright: ignore[reportCallIssue]
        self._tell(flat, y)
        return y.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={self.sparsity:.4f}"
        )


class TrainableConv2d(SparseWeight):
    """A 2-d convolution (zero padding) with a sparse weight, for training."""

    def __init__(
        self,
        pattern: Pattern,
        values: Tensor,
        bias: Tensor | None,
        in_channels: int,
        window: Window,
    ) -> None:
        """See SparseWeight; pattern: over [out, in / groups kh kw]."""
        shape = (pattern.shape[0], in_channels // window.groups, *window.kernel)
        super().__init__(pattern, values, bias, shape)
        self.in_channels, self.out_channels, self.window = in_channels, pattern.shape[0], window

    @classmethod
    def from_dense(cls, module: nn.Conv2d, mask: Tensor | None = None) -> TrainableConv2d:
        """Take the kept weights of a dense convolution; ShapeError if `unsupported`."""
        reason = unsupported(module)
        if reason:
            raise ShapeError(f"{module} cannot be trained packed: {reason}; keep it dense")
        window = Window(
            _pair(module.kernel_size),
            _pair(module.stride),
            _padding(module),
            _pair(module.dilation),
            module.groups,
        )
        pattern, values = _packed(module.weight, mask)
        return _learning(cls(pattern, values, module.bias, module.in_channels, window), module)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as nn.Conv2d with zeros."""
        w = self.window
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, w.kernel, w.stride, w.padding, w.dilation,
            w.groups, bias=self.bias is not None, device="meta",
        )  # fmt: skip
        return _filled(dense, self)

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, H, W] or [C, H, W]; ShapeError where the channels differ."""
        _check_input(input)
        if input.dim() not in (3, 4) or input.shape[-3] != self.in_channels:
            raise ShapeError(f"input is {list(input.shape)}, not [B, {self.in_channels}, H, W]")
        x = input if input.dim() == 4 else input.unsqueeze(0)
        given = (x, self.values, self.bias, self._way(), self.window)
        y = _convolution(*given)  # pyright: ignore[reportCallIssue]
        self._tell(x, y, self.window)
        return y if input.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        return (
            f"{self.in_channels}, {self.out_channels}, {self.window}, "
            f"bias={self.bias is not None}, sparsity={self.sparsity:.4f}"
        )


@torch.compiler.disable
def _check_topology(layer: SparseWeight) -> None:
    held, key = layer.topology, layer.pattern.key
    if held.is_cpu and torch.equal(held, key):
        return
    # averages of equal integers are off by their rounding
    if bool(((held.cpu() - key).abs() > 64).any()):
        raise FormatError(
            "the values of this layer were copied or averaged by their index from a layer of "
            "another topology: use prunus.training.average to average packed layers"
        )


@torch.compiler.disable
def _call(look: Callable[[Outer], None], rows: Outer) -> None:
    look(rows)


@torch.compiler.disable
def _linear(*args: Any) -> Any:
    return LinearStep.apply(*args)


@torch.compiler.disable
def _convolution(*args: Any) -> Any:
    return ConvolutionStep.apply(*args)


def unsupported(module: nn.Conv2d) -> str:
    """Say why a convolution cannot be trained packed; empty if it can."""
    if module.groups > 1 and module.groups == module.in_channels:
        return f"groups={module.groups}: one input channel each leaves nothing to leave out"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding == "same" and any(span % 2 for span in spans):
        return "padding='same' is uneven for this kernel"
    return ""


def _padding(module: nn.Conv2d) -> Pair:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        spans = [d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return spans[0], spans[1]
    assert not isinstance(module.padding, str)
    return _pair(module.padding)


def _pair(value: tuple[int, ...]) -> Pair:
    return int(value[0]), int(value[1])


def _packed(weight: Tensor, mask: Tensor | None) -> tuple[Pattern, Tensor]:
    """Return pattern and values of what a mask keeps (also zeros), or of the non-zeros."""
    matrix = weight.detach().reshape(weight.shape[0], -1)
    if mask is None:
        mask = weight.detach() != 0
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
        held = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask)
        raise ShapeError(f"the mask is {held}, not a bool tensor {list(weight.shape)} (True: kept)")
    kept = mask.to(weight.device).reshape(matrix.shape)
    places = kept.reshape(-1).nonzero().flatten()
    return Pattern.of((matrix.shape[0], matrix.shape[1]), places.cpu()), matrix.reshape(-1)[places]


def _filled(dense: Any, module: SparseWeight) -> Any:
    state = {"weight": module.dense_weight()}
    if module.bias is not None:
        state["bias"] = module.bias.detach().clone()
    dense.load_state_dict(state, assign=True)
    dense.weight.requires_grad_(module.values.requires_grad)
    if module.bias is not None:
        dense.bias.requires_grad_(module.bias.requires_grad)
    return dense.train(module.training)


L = TypeVar("L", bound=SparseWeight)


def _learning(layer: L, module: Any) -> L:
    """The layer with its parameters frozen where the module's are, in the same mode."""
    layer.values.requires_grad_(module.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(module.bias.requires_grad)
    return layer.train(module.training)


def _check_input(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueRangeError(f"input is {x.dtype}: packed layers train on real floating numbers")


def distinct(size: int, count: int, key: rng.Key) -> Tensor:
    """Draw `count` distinct places below `size`, sorted, in memory proportional to `count`."""
    if 2 * count > size:
        left = torch.ones(size, dtype=torch.bool)
        left[distinct(size, size - count, key)] = False
        return left.nonzero().flatten()
    generator = rng.generator(key)
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = torch.randint(size, (int((count - len(found)) * 1.1) + 16,), generator=generator)
        found = torch.unique(torch.cat([found, more]))
    surplus = len(found) - count
    if surplus:
        gone = torch.randperm(len(found), generator=generator)[:surplus]
        stay = torch.ones(len(found), dtype=torch.bool)
        stay[gone] = False
        found = found[stay]
    return found

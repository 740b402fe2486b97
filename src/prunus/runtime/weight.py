"""What both sparse modules share: a packed weight that is checked wherever it comes in."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.runtime.epilogue import Fusing
from prunus.runtime.ops import blob_array

ALIGNMENT = 64
W = TypeVar("W", bound="PackedWeight")


def pack_weight(weight: Tensor, block: int | None = None, kind: str = "csr_f32") -> Tensor:
    """Blob of a weight [M, ...] as the matrix [M, -1]; block and kind as in kernels.pack."""
    matrix = weight.detach().to("cpu", torch.float32).reshape(weight.shape[0], -1)
    return torch.from_numpy(kernels.pack(matrix.contiguous().numpy(), block, kind))


def check_blob(packed: Tensor, place: str) -> tuple[int, int]:
    """(rows, columns) of a blob that is safe to multiply with; FormatError if it is not."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.device.type != "cpu":
        raise FormatError(
            f"{place} is {packed.dtype} {list(packed.shape)} on {packed.device}; "
            f"a packed weight is 1-d uint8 on the CPU"
        )
    blob = blob_array(aligned(packed))
    try:
        kernels.validate(blob)
    except FormatError as error:
        raise FormatError(f"{place} is not a packed weight: {error}") from error
    held = kernels.info(blob)
    return held.rows, held.cols


def aligned(packed: Tensor) -> Tensor:
    """The blob itself if it is contiguous and aligned as the kernels want it, else a copy."""
    packed = packed.detach().contiguous()
    return packed.clone() if packed.data_ptr() % ALIGNMENT else packed


class PackedWeight(Fusing, abc.ABC):
    """A layer whose weight is a packed blob; inference only, fp32 arithmetic on the CPU.

    Buffers: `packed` (uint8, 1-d) and `bias` ([M] or None). The blob is validated when it is given,
    loaded from a state dict or unpickled. Pruned positions are skipped, not multiplied: NaN or
    infinity in an input reaches only the outputs that keep a weight on it, where a dense layer
    would spread NaN to all of them (0 times NaN).
    """

    packed: Tensor
    bias: Tensor | None
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype = torch.float32  # of the dense layer that this one stands for

    def __init__(self, packed: Tensor, bias: Tensor | None, weight_shape: tuple[int, ...]) -> None:
        """Take a blob of a [M, K] matrix; weight_shape is the dense [M, ...] with K = its rest."""
        super().__init__()
        self.weight_shape = tuple(int(size) for size in weight_shape)
        self._expect(packed, "packed")
        if bias is not None and tuple(bias.shape) != self.weight_shape[:1]:
            raise ShapeError(
                f"bias has shape {list(bias.shape)}, expected {list(self.weight_shape[:1])}"
            )
        self.register_buffer("packed", aligned(packed))
        self.register_buffer("bias", None if bias is None else bias.detach().clone().contiguous())
        self.eval()

    @abc.abstractmethod
    def to_dense(self) -> nn.Module:
        """The same layer as a dense torch module."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked anew at every access; writing to it changes nothing."""
        with torch._C._DisableFuncTorch():  # pyright: ignore[reportAttributeAccessIssue]
            dense = kernels.unpack(blob_array(self.packed))
        return torch.from_numpy(dense).reshape(self.weight_shape).to(self.weight_dtype)

    def standing_for(self: W, module: nn.Module) -> W:
        """Itself, with `weight` in bfloat16 if that of the dense layer is, which loses nothing."""
        if getattr(module.weight, "dtype", None) == torch.bfloat16:
            self.weight_dtype = torch.bfloat16
        return self

    @property
    def kind(self) -> str:
        """How the weight is packed: csr_f32, tiled_f32 or one of the bitmaps."""
        return kernels.info(blob_array(self.packed)).kind

    @property
    def nonzeros(self) -> int:
        """Stored weights."""
        return kernels.info(blob_array(self.packed)).nnz

    @property
    def sparsity(self) -> float:
        """Fraction of the weight that was removed; 0 for an empty weight."""
        size = math.prod(self.weight_shape)
        return 1.0 - self.nonzeros / size if size else 0.0

    def sparse_counts(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """{parameter: (dense shape, non-zeros)} of the dense layer that this one stands for."""
        if not self.counted:
            return {}
        counts = {"weight": (self.weight_shape, self.nonzeros)}
        if self.bias is not None:
            counts["bias"] = (tuple(self.bias.shape), int(self.bias.count_nonzero()))
        return counts

    def check_packed(self, packed: Tensor, place: str) -> None:
        """FormatError or ShapeError unless this blob may replace the present one."""
        self._expect(packed, place)

    def _expect(self, packed: Tensor, place: str) -> None:
        """Validate a blob and its matrix shape."""
        rows, columns = check_blob(packed, place)
        expected = (self.weight_shape[0], math.prod(self.weight_shape[1:]))
        if (rows, columns) != expected:
            raise ShapeError(
                f"{place} holds a {rows}x{columns} weight, "
                f"this layer takes {expected[0]}x{expected[1]}"
            )

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, packed, bias), fp32; an error where the kernels cannot compute."""
        buffers = self._buffers  # half a microsecond less than attributes, in every call
        packed, bias = cast(Tensor, buffers["packed"]), buffers["bias"]
        if not (x.is_cpu and packed.is_cpu):
            raise ValueRangeError(
                f"input on {x.device}, packed weight on {packed.device}; prunus kernels run on the "
                f"CPU: move both with .cpu(), or use to_dense() elsewhere"
            )
        if packed.dtype != torch.uint8:
            raise FormatError(
                f"the packed weight became {packed.dtype}; module.type() converts buffers of any "
                f"kind, use .half(), .bfloat16() or .to(dtype)"
            )
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueRangeError(
                f"input is {x.dtype}; a packed layer computes in fp32 and takes float32, float16 "
                f"or bfloat16: convert the input, or use to_dense()"
            )
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.to(torch.float32)
        return x if x.dtype == torch.float32 else x.to(torch.float32), packed, bias

    def _direct(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
        """Whether the kernel may be called on the addresses, past torch's dispatcher."""
        # Of a tensor with the negative bit, memory holds something else than its values.
        if type(x) is not Tensor or observed() or x.is_neg():
            return False
        if residual is not None and (type(residual) is not Tensor or residual.is_neg()):
            return False
        wanted = x.requires_grad or (bias is not None and bias.requires_grad)
        wanted = wanted or (residual is not None and residual.requires_grad)
        return not (wanted and torch.is_grad_enabled())

    def _apart(self, x: Tensor, residual: Tensor) -> Tensor:
        """The layer where a kernel cannot add the residual: it broadcasts, or is not fp32."""
        return self.finished(self.with_activation("")(x), residual)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Validate a blob before it replaces the present one; another number of bytes is fine."""
        key = f"{prefix}packed"
        blob = state_dict.get(key)
        if isinstance(blob, Tensor):
            self._expect(blob, key)
            state_dict = {**state_dict, key: aligned(blob)}
            if blob.shape != self.packed.shape:
                self.packed = torch.zeros_like(blob)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle or deepcopy; the blob is validated."""
        super().__setstate__(state)
        if self.packed.device.type == "cpu":
            self._expect(self.packed, "packed")
            self.packed = aligned(self.packed)

    def _shape_repr(self) -> str:
        """Bias, sparsity and fused activation, for extra_repr."""
        fused = f", activation={self.activation!r}" if self.activation else ""
        return f"bias={self.bias is not None}, sparsity={self.sparsity:.4f}{fused}"


def observed() -> bool:
    """Whether someone watches torch's operators: a tracer or a dispatch mode.

    A call past the dispatcher would be invisible to them, and a trace silently wrong.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or transformed()
    )


def transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work: operators would drop those.

    Layers then compute densely, which knows all of them.
    """
    if torch.compiler.is_compiling():
        return False
    functions = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return forward_ad._current_level >= 0 or functions.peek_interpreter_stack() is not None

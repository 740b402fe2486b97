"""Attention and layer normalisation through the kernels, wherever torch's own would compute them.

`prunus::attention`: [B, S, H, E] = softmax(scale q k^T + mask) v for q [B, H, S, D], k [B, G, T, D]
and v [B, G, T, E]; fp32 on the CPU, without gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function
from torch.utils.flop_counter import register_flop_formula

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError
from prunus.runtime.weight import observed, transformed

FEWEST = 8
"""Queries below which torch's operator is faster: the kernel's lanes are queries."""


def attention_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Call the kernel on fp32 [B, H, S, D] with contiguous rows; a new [B, S, H, E]. No checks."""
    batch, heads, queries, dim = query.shape
    groups, keys, columns = key.shape[1], key.shape[2], value.shape[3]
    out = query.new_empty((batch, queries, heads, columns))
    steps, place, kind = (0, 0, 0, 0), 0, kernels.NO_MASK
    if mask is not None:
        steps, place = mask.expand(batch, heads, queries, keys).stride(), mask.data_ptr()
        kind = kernels.ALLOWED if mask.dtype == torch.bool else kernels.ADDED
    row = heads * columns
    kernels.attention_ptr(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        (batch, heads, queries, keys, dim, columns, heads // groups),
        (
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *(queries * row, columns, row),
            *steps,
        ),
        scale,
        place,
        kind,
        causal,
        torch.get_num_threads(),
    )
    return out


@torch.library.custom_op(
    "prunus::attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, float scale) "
    "-> Tensor",
)
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The kernel's output [B, S, H, E]; torch's without the native module."""
    if not _fits(query, key, value, mask, True):
        shapes = [list(tensor.shape) for tensor in (query, key, value)]
        raise ShapeError(f"query, key and value of shapes {shapes} do not fit, or the mask")
    for tensor in (query, key, value):
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise ValueRangeError(
                f"an input is {tensor.dtype} on {tensor.device}; the operator takes CPU "
                f"torch.float32"
            )
    if kernels.attention_ptr is None or not (key.shape[2] and query.shape[3]):
        found = F.scaled_dot_product_attention(
            query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=True
        )
        return found.transpose(1, 2).contiguous()
    q, k, v = (held if held.stride(3) == 1 else held.contiguous() for held in (query, key, value))
    return attention_rows(q, k, v, mask, causal, scale)


@attention.register_fake
def _(query, key, value, mask, causal, scale):
    batch, heads, queries = query.shape[:3]
    return query.new_empty((batch, queries, heads, value.shape[3]))


@register_flop_formula(torch.ops.prunus.attention)
def _operations(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    """Of both products, masked or not, as torch counts them; from shapes."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[2] * (dim + value[3])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, by the kernel where it takes the arguments.

    The result [B, H, S, E] is a view of [B, S, H, E], so that turning it back costs nothing. What
    wants gradients, other dtypes, dropout and few queries go to torch.
    """
    given = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if has_torch_function(given):
        return handle_torch_function(
            attend, given, query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
            is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    plain = not dropout_p and not transformed()
    if plain and _takes(given, attn_mask, is_causal, enable_gqa):
        factor = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
        if observed():
            out = torch.ops.prunus.attention(query, key, value, attn_mask, is_causal, factor)
            return out.transpose(1, 2)
        if _direct(given, query):
            out = attention_rows(query, key, value, attn_mask, is_causal, factor)
            return out.transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _takes(given: tuple[Tensor, ...], mask: Tensor | None, causal: bool, shared: bool) -> bool:
    """Whether the operator computes what torch would."""
    if kernels.attention_ptr is None or (mask is not None and causal):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    if any(tensor.dtype != torch.float32 or not tensor.is_cpu for tensor in given[:3]):
        return False
    return _fits(given[0], given[1], given[2], mask, shared)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shared: bool) -> bool:
    """Whether the shapes are those of the kernel."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    (batch, heads, queries, dim), (groups, keys) = query.shape, key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != dim or value.shape[:3] != key.shape[:3]:
        return False
    if heads != groups and not (shared and groups and heads % groups == 0):
        return False
    if mask is None:
        return True
    wanted = (batch, heads, queries, keys)[4 - mask.dim() :]
    if mask.dtype not in (torch.bool, torch.float32) or mask.dim() > 4 or not mask.is_cpu:
        return False
    return all(size in (1, full) for size, full in zip(mask.shape, wanted, strict=True))


def _direct(given: tuple[Tensor, ...], query: Tensor) -> bool:
    """Whether the kernel may be called on the addresses, and pays."""
    plain = all(type(tensor) is Tensor and not tensor.is_neg() for tensor in given)
    if not plain or query.shape[2] < FEWEST or not all(tensor.numel() for tensor in given):
        return False
    return all(tensor.stride(3) == 1 for tensor in given[:3])


class Redirect(TorchFunctionMode):
    """F.scaled_dot_product_attention by the kernel, everything else as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = attend if func is F.scaled_dot_product_attention else func
        return func(*args, **(kwargs or {}))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last axis, by the kernel for fp32 on the CPU without gradients."""

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> LayerNorm:
        """A twin with copies of the parameters."""
        shape, affine = norm.normalized_shape, norm.elementwise_affine
        twin = cls(list(shape), norm.eps, affine, norm.bias is not None, "meta")
        twin.load_state_dict(
            {name: held.detach().clone() for name, held in norm.state_dict().items()}, assign=True
        )
        return twin.eval().requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input."""
        parameters = self._parameters
        gamma, beta = parameters["weight"], parameters["bias"]
        if not self._direct(input, gamma, beta):
            return super().forward(input)
        y = input.new_empty(input.shape)
        columns = self.normalized_shape[0]
        kernels.layer_norm_ptr(
            input.data_ptr(),
            y.data_ptr(),
            0 if gamma is None else gamma.data_ptr(),
            0 if beta is None else beta.data_ptr(),
            y.numel() // columns,
            columns,
            self.eps,
            torch.get_num_threads(),
        )
        return y

    def _direct(self, x: Any, *parameters: Tensor | None) -> bool:
        """Whether the kernel may be called on the addresses."""
        if type(x) is not Tensor or observed() or kernels.layer_norm_ptr is None:
            return False
        if len(self.normalized_shape) != 1 or x.shape[-1:] != self.normalized_shape:
            return False
        held = [x, *(value for value in parameters if value is not None)]
        if any(
            tensor.dtype != torch.float32
            or not tensor.is_cpu
            or not tensor.is_contiguous()
            or tensor.is_neg()
            for tensor in held
        ):
            return False
        if not x.numel():
            return False
        return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held))

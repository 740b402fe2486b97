"""The three products of a sparse layer's training step, natively or block by block in torch.

W [M, K] is a Pattern and its values [nnz]. Layouts: tokens x [N, K], y [N, M]; planes x [K, N],
y [M, N]. No path holds a dense weight or gradient; the torch path unpacks blocks of rows.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType

import torch
from torch import Tensor

from prunus import kernels
from prunus.training.pattern import Pattern

BLOCK = 1 << 20
"""Elements of a dense block of rows."""

_scratch = threading.local()


def _native() -> ModuleType | None:
    if kernels.active_isa() == kernels.FALLBACK:
        return None
    return importlib.import_module("prunus._native")


NATIVE = _native()


def runs_native(*tensors: Tensor | None) -> bool:
    """Tell whether the kernels can compute with these: all float32 on the CPU."""
    return NATIVE is not None and all(
        t is None or (t.is_cpu and t.dtype == torch.float32) for t in tensors
    )


def multiply(
    pattern: Pattern,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    planes: bool = False,
    native: bool = True,
) -> Tensor:
    """W x (+ bias): y [N, M] of tokens, or [M, N] of planes. native: False for torch's products."""
    n = x.shape[1] if planes else x.shape[0]
    rows = pattern.shape[0]
    if pattern.full or not (native and runs_native(values, x, bias)):
        return _multiply_blocks(pattern, values, x, bias, planes)
    y = x.new_empty((rows, n) if planes else (n, rows))
    if y.numel():
        x, values = x.contiguous(), values.detach().contiguous()
        _run(pattern.address(values), x, y, n, bias, planes)
    return y


def multiply_transposed(
    pattern: Pattern, values: Tensor, g: Tensor, planes: bool = False, native: bool = True
) -> Tensor:
    """W^T g: the gradient to the input, [N, K] of tokens or [K, N] of planes."""
    n = g.shape[1] if planes else g.shape[0]
    columns = pattern.shape[1]
    if pattern.full or not (native and runs_native(values, g)):
        return _multiply_transposed_blocks(pattern, values, g, planes)
    out = g.new_empty((columns, n) if planes else (n, columns))
    if out.numel():
        assert NATIVE is not None
        g = g.contiguous()
        blob = pattern.turned_address(NATIVE, values.detach(), room(pattern.nnz))
        _run(blob, g, out, n, None, planes)
    return out


def _run(blob: int, x: Tensor, y: Tensor, n: int, bias: Tensor | None, planes: bool) -> None:
    threads, offset = torch.get_num_threads(), 0
    if bias is not None:
        bias = bias.detach().contiguous()
        offset = bias.data_ptr()
    if planes:
        kernels.planes_ptr(blob, x.data_ptr(), y.data_ptr(), n, offset, 0, threads, n, n)
    else:
        kernels.linear_ptr(blob, x.data_ptr(), y.data_ptr(), n, offset, 0, threads)


def room(count: int) -> Tensor:
    """Memory for the values of a transposed weight, shared by all layers of a thread."""
    held: Tensor | None = getattr(_scratch, "values", None)
    if held is None or held.numel() < count:
        _scratch.values = held = torch.empty(count)
    return held[:count]


def sampled(
    pattern: Pattern,
    x: Tensor,
    g: Tensor,
    planes: bool = False,
    out: Tensor | None = None,
    native: bool = True,
) -> Tensor:
    """Values of g^T x at the non-zeros: the gradient to the values [nnz], added to `out` if given.

    tokens: x [N, K], g [N, M]; planes: x [K, N], g [M, N].
    """
    if pattern.full or not (native and runs_native(x, g)):
        found = _sampled_blocks(pattern, x, g, planes)
        return found if out is None else out.add_(found)
    assert NATIVE is not None
    x, g = x.contiguous(), g.contiguous()
    n = x.shape[1] if planes else x.shape[0]
    add = out is not None
    if out is None:
        out = x.new_empty(pattern.nnz)
    if not pattern.nnz:
        return out
    NATIVE.sddmm_ptr(
        pattern.address(out), x.data_ptr(), g.data_ptr(), out.data_ptr(), n, not planes, add,
        torch.get_num_threads(), x.shape[1], g.shape[1],
    )  # fmt: skip
    return out


# --- in torch ---------------------------------------------------------------------------------


def blocks(pattern: Pattern) -> list[tuple[int, int]]:
    """Ranges of rows whose dense form has at most BLOCK elements."""
    height = max(1, BLOCK // max(1, pattern.shape[1]))
    rows = pattern.shape[0]
    return [(begin, min(rows, begin + height)) for begin in range(0, rows, height)]


def unpacked(pattern: Pattern, values: Tensor, begin: int, end: int) -> Tensor:
    """Dense rows [begin, end) of the weight."""
    first, last = int(pattern.offsets[begin]), int(pattern.offsets[end])
    if pattern.full:
        return values.detach()[first:last].view(end - begin, pattern.shape[1])
    dense = values.new_zeros((end - begin) * pattern.shape[1])
    dense[pattern.row_places(begin, end).to(values.device)] = values.detach()[first:last]
    return dense.view(end - begin, pattern.shape[1])


def _multiply_blocks(
    pattern: Pattern, values: Tensor, x: Tensor, bias: Tensor | None, planes: bool
) -> Tensor:
    n, rows = x.shape[1 if planes else 0], pattern.shape[0]
    y = x.new_empty((rows, n) if planes else (n, rows))
    for begin, end in blocks(pattern):
        part = unpacked(pattern, values, begin, end)
        if planes:
            torch.mm(part, x, out=y[begin:end])
        else:
            y[:, begin:end] = x @ part.t()
    if bias is None:
        return y
    return y.add_(bias[:, None] if planes else bias)


def _multiply_transposed_blocks(
    pattern: Pattern, values: Tensor, g: Tensor, planes: bool
) -> Tensor:
    n = g.shape[1] if planes else g.shape[0]
    total = g.new_zeros((pattern.shape[1], n) if planes else (n, pattern.shape[1]))
    for begin, end in blocks(pattern):
        part = unpacked(pattern, values, begin, end)
        total += part.t() @ g[begin:end] if planes else g[:, begin:end] @ part
    return total


def _sampled_blocks(pattern: Pattern, x: Tensor, g: Tensor, planes: bool) -> Tensor:
    parts = []
    for begin, end in blocks(pattern):
        dense = g[begin:end] @ x.t() if planes else g[:, begin:end].t() @ x
        flat = dense.reshape(-1)
        parts.append(flat if pattern.full else flat[pattern.row_places(begin, end).to(x.device)])
    return parts[0] if len(parts) == 1 else torch.cat([x.new_zeros(0), *parts])

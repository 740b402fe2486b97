"""Attention between linear layers without the views around it: one call on [B, S, H D] tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

from prunus import kernels
from prunus.runtime.attention import FEWEST, attend
from prunus.runtime.weight import observed


def attend_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """[B, S, W] = attention of [B, S, W], [B, T, W], [B, T, W], each of `heads` heads side by side.

    By the kernel where it takes the arguments, else through the views and `attend`.
    """
    given = (query, key, value)
    if has_torch_function(given):
        return handle_torch_function(
            attend_tokens, given, query, key, value, heads, is_causal=is_causal, scale=scale
        )
    if _direct(given, heads):
        return _called(query, key, value, heads, is_causal, scale)
    q, k, v = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in given)
    return attend(q, k, v, is_causal=is_causal, scale=scale).transpose(1, 2).flatten(2)


def _direct(given: tuple[Tensor, ...], heads: int) -> bool:
    """Whether the kernel may be called on the addresses."""
    query, key, value = given
    shape = key.shape
    if query.dim() != 3 or len(shape) != 3 or value.shape != shape or query.shape[1] < FEWEST:
        return False
    if query.shape[0] != shape[0] or query.shape[2] != shape[2] or shape[2] % heads:
        return False
    watched = torch.is_grad_enabled()
    for tensor in given:
        if type(tensor) is not Tensor or tensor.dtype != torch.float32 or not tensor.is_cpu:
            return False
        if tensor.stride(2) != 1 or (watched and tensor.requires_grad) or not tensor.numel():
            return False
    return kernels.attention_ptr is not None and not observed()


def _called(
    query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool, scale: float | None
) -> Tensor:
    """The kernel's output."""
    batch, queries, width = query.shape
    dim = width // heads
    out = query.new_empty((batch, queries, width))
    qb, qs, _ = query.stride()
    kb, ks, _ = key.stride()
    vb, vs, _ = value.stride()
    kernels.attention_ptr(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        (batch, heads, queries, key.shape[1], dim, dim, 1),
        (qb, dim, qs, kb, dim, ks, vb, dim, vs, queries * width, dim, width, 0, 0, 0, 0),
        1 / math.sqrt(dim) if scale is None else float(scale),
        0,
        kernels.NO_MASK,
        causal,
        torch.get_num_threads(),
    )
    return out


def simplify(graph: fx.Graph) -> None:
    """Put `attend_tokens` in place of views, `attend` and views, where that is all there is."""
    for node in [node for node in graph.nodes if node.target is attend]:
        options = dict(node.kwargs)
        scale, causal = options.pop("scale", None), options.pop("is_causal", False)
        if options.pop("attn_mask", None) is not None or options.pop("dropout_p", 0.0):
            continue
        if options or len(node.args) != 3 or not isinstance(causal, bool):
            continue
        split = [_split(one) for one in node.args]
        last = _joined(node)
        heads = {found[1] for found in split if found is not None}
        if None in split or last is None or len(heads) != 1 or isinstance(scale, fx.Node):
            continue
        sources = [found[0] for found in split if found is not None]
        with graph.inserting_before(node):
            whole = graph.call_function(
                attend_tokens, (*sources, heads.pop()), {"is_causal": causal, "scale": scale}
            )
        last.replace_all_uses_with(whole)
        _erase(graph, last, until=node)
    graph.lint()


def _erase(graph: fx.Graph, last: fx.Node, until: fx.Node) -> None:
    """Remove the views behind attention, attention, and the views before it that nothing reads."""
    node = last
    while node is not until:
        before = node.args[0]
        graph.erase_node(node)
        assert isinstance(before, fx.Node)
        node = before
    turned = dict.fromkeys(until.args)
    graph.erase_node(until)
    for one in turned:
        if isinstance(one, fx.Node) and not one.users:
            view = one.args[0]
            graph.erase_node(one)
            if isinstance(view, fx.Node) and not view.users:
                graph.erase_node(view)


def _split(node: Any) -> tuple[fx.Node, int] | None:
    """(x, heads) if a node is [B, H, S, D] made of x [B, S, H D] by views."""
    if not _turns(node):
        return None
    view = node.args[0]
    if not isinstance(view, fx.Node) or view.op != "call_method" or view.kwargs:
        return None
    x, *sizes = view.args
    if view.target == "unflatten" and len(sizes) == 2 and sizes[0] in (-1, 2):
        sizes = [-1, -1, *sizes[1]] if isinstance(sizes[1], (tuple, list)) else []
    elif view.target not in ("view", "reshape") or not all(_free(size) for size in sizes[:2]):
        return None
    if len(sizes) != 4 or not isinstance(x, fx.Node):
        return None
    heads, dim = sizes[2:]
    if not isinstance(heads, int) or heads < 1 or not isinstance(dim, int):
        return None
    return x, heads


def _joined(node: fx.Node) -> fx.Node | None:
    """The node [B, S, H D] that is all that is made of the output [B, H, S, D], by views."""
    turned = _only(node)
    if turned is None or not _turns(turned):
        return None
    last = _only(turned)
    if last is not None and last.op == "call_method" and last.target == "contiguous":
        last = _only(last) if len(last.args) == 1 and not last.kwargs else None
    if last is None or last.op != "call_method" or last.kwargs:
        return None
    sizes = last.args[1:]
    if last.target == "flatten":
        return last if sizes in ((2,), (-2,), (2, 3), (2, -1), (-2, -1)) else None
    shaped = last.target in ("view", "reshape") and len(sizes) == 3
    return last if shaped and all(_free(size) for size in sizes[:2]) else None


def _turns(node: Any) -> bool:
    """Whether a node exchanges the second and the third axis of four."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.kwargs:
        return False
    axes = node.args[1:]
    if node.target == "transpose":
        return axes in ((1, 2), (2, 1), (-3, -2), (-2, -3))
    return node.target == "permute" and axes in ((0, 2, 1, 3), ((0, 2, 1, 3),), ([0, 2, 1, 3],))


def _free(size: Any) -> bool:
    """Whether a size is not fixed to a number, which only some inputs would have."""
    return isinstance(size, fx.Node) or size == -1


def _only(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one."""
    return next(iter(node.users)) if len(node.users) == 1 else None

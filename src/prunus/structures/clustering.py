"""Outputs that want the same columns, put next to each other before they are cut in groups."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.errors import ShapeError, ValueRangeError


def cluster_rows(score: Tensor, height: int, sparsity: float) -> tuple[int, ...]:
    """An order of the outputs for `vector(height, order=...)`: more score is kept than in theirs.

    score: [outputs, ...], higher = keep, not negative (|w|, Wanda). sparsity: what will be removed.
    Each group starts with the strongest output that is left, and takes the one that has the largest
    share of its score in the k best columns of the group's sum, until it is full; k columns remain
    at this sparsity. The kernels write through the order at no cost. ShapeError where the outputs
    do not divide by the height. Time outputs² x columns.
    """
    rows, columns = score.shape[0], score[:1].numel()
    if score.dim() < 2 or height < 1 or rows % height:
        raise ShapeError(
            f"the {rows} outputs of shape {tuple(score.shape)} do not divide into groups of "
            f"{height}; choose a height that divides them"
        )
    if not 0 <= sparsity < 1 or not columns or bool((score < 0).any()):
        raise ValueRangeError(f"sparsity {sparsity} is not within 0 and 1, or scores are negative")
    flat = score.detach().reshape(rows, columns).double()
    total = flat.sum(1)
    kept = max(1, round(columns * (1 - sparsity)))
    left = torch.ones(rows, dtype=torch.bool)
    order: list[int] = []
    for _ in range(rows // height):
        group = torch.zeros(columns, dtype=torch.float64)
        value = total
        for _ in range(height):
            at = int(torch.where(left, value, -1.0).argmax())
            left[at] = False
            order.append(at)
            group = group + flat[at]
            best = group.topk(kept).indices
            value = flat[:, best].sum(1) / total.clamp_min(1e-300)
    return tuple(order)

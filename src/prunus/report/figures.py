"""Pictures of a run as SVG or PNG that read on light and on dark paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from prunus.errors import ShapeError, ValueRangeError
from prunus.metrics import Latency
from prunus.report.canvas import ACCENTS, DENSE, INK, MUTED, canvas, png_module, svg_text
from prunus.report.content import Figure
from prunus.report.numbers import count, duration, percent, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = (0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_WIDTH = 5.6  # inches: text of 9 points stays readable when the picture fills a phone
_EDGE = 512  # pixels of the longer side of a mask picture


def accuracy_against_sparsity(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    dense: Sequence[float] = (),
    *,
    title: str = "Accuracy against sparsity",
) -> Figure:
    """Test accuracy (fractions, one per seed) over sparsity on a logit axis.

    curves: {method: {sparsity: accuracies}}; lines join medians, bands span the seeds.
    dense: accuracies of the dense network, drawn as a line and a band.
    Raises ValueRangeError for a sparsity outside 0..1 (both excluded) or an empty list.
    """
    for label, points in curves.items():
        for sparsity, values in points.items():
            if not 0 < sparsity < 1 or not len(values):
                raise ValueRangeError(
                    f"curve {label!r}: sparsity {sparsity} with {len(values)} accuracies; a point "
                    "needs 0 < sparsity < 1 and one accuracy per seed (dense runs go to `dense`)"
                )
    figure, axes = canvas(_WIDTH, 3.3)
    if len(dense):
        middle = float(np.median(dense))
        axes.axhspan(min(dense), max(dense), color=DENSE, alpha=0.18, linewidth=0)
        axes.axhline(middle, color=DENSE, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.annotate(
            f"dense {percent(middle)}", (0.995, middle), (0, 4), color=INK, fontsize=9, ha="right",
            xycoords=("axes fraction", "data"), textcoords="offset points",
        )  # fmt: skip
    for colour, (label, points) in zip(_cycle(ACCENTS), curves.items(), strict=False):
        _curve(axes, label, points, colour)
    _sparsity_axis(axes, [s for points in curves.values() for s in points])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_ylabel("test accuracy")
    if len(curves) > 1:
        legend = axes.legend(frameon=False, labelcolor=INK, loc="lower left", fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name with two dollar signs is not a formula
    axes.margins(y=0.09)
    return Figure(title, svg_text(figure), _curve_caption(curves, dense), _curve_alt(curves, dense))


def layer_sparsity(
    layers: Sequence[tuple[str, float, int]], *, title: str = "Sparsity by layer"
) -> Figure:
    """Horizontal bars, one per (layer name, sparsity, parameters), in the given order."""
    if not layers:
        raise ValueRangeError("layer_sparsity: no layers; pass (name, sparsity, parameters)")
    figure, axes = canvas(_WIDTH, 0.7 + 0.32 * len(layers))
    places = range(len(layers))
    axes.barh(places, [1.0] * len(layers), color=MUTED, alpha=0.16, height=0.66)
    axes.barh(places, [s for _, s, _ in layers], color=ACCENTS[0], height=0.66)
    for place, (_, sparsity, parameters) in zip(places, layers, strict=True):
        kept = round((1 - sparsity) * parameters)
        axes.annotate(
            f"{percent(sparsity)} · {count(kept)} kept", (1.0, place),
            (8, 0), textcoords="offset points", va="center", fontsize=9, color=INK,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(places, [_shorten(name) for name, _, _ in layers], parse_math=False)
    axes.set_ylim(len(layers) - 0.45, -0.55)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_xlabel("weights removed")
    axes.grid(visible=False)
    alt = "; ".join(f"{name} {percent(sparsity)}" for name, sparsity, _ in layers)
    caption = "Fraction of the weights that each layer lost, and what it kept."
    return Figure(title, svg_text(figure), caption, f"Bars of sparsity by layer: {alt}.")


def latency_bars(groups: Mapping[str, Mapping[str, Latency]], *, title: str = "Latency") -> Figure:
    """Bars of median latency with 10th to 90th percentile: {group: {name: latency}}.

    Each group (such as a batch size) has its own axis, because latencies differ by magnitudes.
    """
    if not groups or not all(groups.values()):
        raise ValueRangeError("latency_bars: pass {group: {name: Latency}} with no group empty")
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    heights = [len(group) for group in groups.values()]
    size = 0.2 + 0.4 * len(groups) + 0.32 * sum(heights)
    figure, axes = canvas(_WIDTH, size, rows=heights)
    for panel, (group, members) in zip(axes, groups.items(), strict=True):
        _latency_panel(panel, group, members, names)
    words = [
        f"{group}, {name}: {_range(latency)}"
        for group, members in groups.items()
        for name, latency in members.items()
    ]
    caption = "Median per call; the line spans the 10th to the 90th percentile. Shorter is better."
    return Figure(title, svg_text(figure), caption, f"Latency: {'; '.join(words)}.")


def mask_picture(mask: torch.Tensor, *, name: str = "mask", title: str = "") -> Figure:
    """A mask as a PNG: kept weights are opaque, removed ones transparent.

    mask: [out, in] or [out, in, height, width] (shown as [out, in * height * width]) or one row;
    true or nonzero = kept. A mask longer than 512 is reduced to local means, and the caption
    says so. Raises ShapeError for an empty mask or one without dimensions.
    """
    if not mask.dim() or not mask.numel():
        raise ShapeError(f"mask of {name}: shape {tuple(mask.shape)} has nothing to show")
    kept = mask.detach().cpu() != 0
    flat = (kept.view(1, -1) if kept.dim() == 1 else kept.flatten(1)).numpy().astype(np.float64)
    cells, sizes = _reduce(flat)
    # A few full cells would leave the rest of a very sparse layer invisible.
    strongest = float(np.quantile(cells, 0.995)) if sizes != (1, 1) else 1.0
    strongest = strongest or float(cells.max()) or 1.0
    shade = np.minimum(cells / strongest, 1.0)
    picture = np.zeros((*shade.shape, 4))
    picture[..., :3] = [int(ACCENTS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    picture[..., 3] = shade
    buffer = io.BytesIO()
    png_module().imsave(buffer, _enlarge(picture), format="png")
    shape = " × ".join(str(size) for size in mask.shape)
    sparsity = percent(1 - float(flat.mean()), 2)
    caption = f"{name}, {shape}, {sparsity} removed. Rows are outputs, columns inputs."
    if mask.dim() > 2:
        caption += f" The kernels of an output lie side by side ({flat.shape[1]:,} columns)."
    if sizes != (1, 1):
        caption += (
            f" Reduced: each cell is the mean of up to {sizes[0]} × {sizes[1]} weights; "
            f"the strongest colour is {percent(strongest, 0)} kept or more."
        )
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Figure(title or f"Mask of {name}", address, caption, f"Picture of the mask: {caption}")


def _curve(axes: Axes, label: str, points: Mapping[float, Sequence[float]], colour: str) -> None:
    places = sorted(points)
    x = _logit(np.array(places))
    values = [np.asarray(points[place], dtype=np.float64) for place in places]
    if any(len(v) > 1 for v in values):
        low, high = [v.min() for v in values], [v.max() for v in values]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        for place, seeds in zip(x, values, strict=True):
            axes.plot([place] * len(seeds), seeds, "o", color=colour, markersize=3, alpha=0.55)
    middle = [float(np.median(v)) for v in values]
    axes.plot(x, middle, "o-", color=colour, markersize=5, linewidth=2, label=label)


def _sparsity_axis(axes: Axes, present: Sequence[float]) -> None:
    low, high = min(present, default=0.5), max(present, default=0.99)
    ticks = [t for t in _TICKS if low * 0.9 <= t <= high + 0.5 * (1 - high)] or [low]
    axes.set_xticks(_logit(np.array(ticks)), [f"{100 * t:g}%" for t in ticks])
    edge = _logit(np.array([low, high]))
    margin = 0.06 * max(edge[1] - edge[0], 2.0)
    axes.set_xlim(edge[0] - margin, edge[1] + margin)
    axes.set_xlabel("weights removed (logit scale)")


def _curve_caption(curves: Mapping[str, Any], dense: Sequence[float]) -> str:
    seeds = max([len(v) for c in curves.values() for v in c.values()] + [len(dense)], default=0)
    if seeds < 2:
        return "One seed."
    return f"Lines join the medians of up to {seeds} seeds; bands span lowest to highest."


def _curve_alt(
    curves: Mapping[str, Mapping[float, Sequence[float]]], dense: Sequence[float]
) -> str:
    words = [f"dense {percent(float(np.median(dense)))}"] if len(dense) else []
    for label, points in curves.items():
        listed = ", ".join(
            f"{percent(float(np.median(points[s])))} at {100 * s:g}%" for s in sorted(points)
        )
        words.append(f"{label}: {listed}")
    return f"Median test accuracy by sparsity. {'; '.join(words)}."


def _latency_panel(
    axes: Axes, group: str, members: Mapping[str, Latency], names: Sequence[str]
) -> None:
    longest = max(latency.p90 for latency in members.values())
    for place, (name, latency) in enumerate(members.items()):
        colour = ([DENSE, *ACCENTS] * len(names))[names.index(name)]
        axes.barh(place, latency.median, color=colour, height=0.66)
        axes.plot([latency.p10, latency.p90], [place, place], color=INK, linewidth=1.4)
        axes.annotate(
            duration(latency.median), (max(latency.p90, latency.median), place), (7, 0),
            textcoords="offset points", va="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(members)), [_shorten(name) for name in members], parse_math=False)
    axes.set_ylim(len(members) - 0.45, -0.55)
    axes.set_xlim(0, longest * 1.16)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(group, loc="left", fontsize=10, color=INK, parse_math=False)
    axes.grid(visible=False)


def _range(latency: Latency) -> str:
    return spread(duration(latency.median), duration(latency.p10), duration(latency.p90))


def _reduce(flat: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Local means so that no side is longer than _EDGE, and the size of a cell."""
    sizes = (-(-flat.shape[0] // _EDGE), -(-flat.shape[1] // _EDGE))
    for axis, size in enumerate(sizes):
        starts = np.arange(0, flat.shape[axis], size)
        lengths = np.diff(np.append(starts, flat.shape[axis]))
        sums = np.add.reduceat(flat, starts, axis=axis)
        flat = sums / (lengths[:, None] if axis == 0 else lengths)
    return flat, sizes


def _enlarge(picture: np.ndarray) -> np.ndarray:
    """Repeat cells to about _EDGE pixels; flat pictures get taller cells, up to one to four."""
    height, width = picture.shape[:2]
    factor = max(1, _EDGE // max(height, width))
    long = factor * max(height, width)
    tall = max(factor, long // 4 // height)
    wide = max(factor, long // 4 // width)
    return picture.repeat(tall, axis=0).repeat(wide, axis=1)


def _logit(values: np.ndarray) -> np.ndarray:
    return np.log(values / (1 - values))


def _cycle(colours: Sequence[str]) -> list[str]:
    return list(colours) * 16


def _shorten(name: str, limit: int = 24) -> str:
    """Leave out the middle of a long layer name; its ends tell layers apart."""
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"

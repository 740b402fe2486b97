"""Matplotlib without its global state, and SVG that follows the colour of the page."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from typing import Any

from prunus.report.errors import ReportError

# Middle tones: each has a contrast above 3 on white and on near-black.
ACCENTS = ("#2f7fc1", "#c9671f", "#3c9a5f", "#a35fb5", "#b8860b", "#cf4a5e")
DENSE = "#8a8f98"
MUTED = "#808891"
INK = "#010203"  # stands for the colour of the page's text: replaced by currentColor

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_STYLE = (
    "<style>.prunus-figure{color:#1d1f23}"
    "@media (prefers-color-scheme:dark){.prunus-figure{color:#dcdfe4}}</style>"
)


def canvas(width: float, height: float, rows: Sequence[int] | None = None) -> tuple[Any, Any]:
    """A figure of width x height inches with one axes, or one per entry of `rows` (its height).

    Raises ReportError without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _missing() from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    if rows is None:
        axes = figure.subplots()
        _plain(axes)
        return figure, axes
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=[r + 1 for r in rows])
    for axes in panels[:, 0]:
        _plain(axes)
    return figure, list(panels[:, 0])


def png_module() -> Any:
    """The module that writes PNG files; raises ReportError without matplotlib."""
    try:
        from matplotlib import image
    except ImportError as error:
        raise _missing() from error
    return image


def svg_text(figure: Any) -> str:
    """The figure as one <svg> element: page colours, scalable, ids of its own, same every time."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "prunus"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    text = text.replace(INK, "currentColor")
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", rf"\1{_FONTS}", text)
    # Several figures share a page, so their ids must not meet.
    prefix = "p" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{prefix}-", text)
    head, body = text.split(">", 1)
    head = re.sub(r' (width|height)="[\d.]+pt"', "", head)
    return f'{head} class="prunus-figure">{_STYLE}{body}'.strip()


def _plain(axes: Any) -> None:
    """Light axes: no box, faint horizontal lines, page-coloured text."""
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)


def _missing() -> ReportError:
    return ReportError(
        "figures need matplotlib, which is not installed; run: pip install 'prunus[report]'"
    )

"""Tables and figures for the terminal, for Markdown, and as one HTML file that opens offline."""

from prunus.report.content import Figure, Highlight, Report, Table
from prunus.report.errors import ReportError
from prunus.report.figures import (
    accuracy_against_sparsity,
    latency_bars,
    layer_sparsity,
    mask_picture,
)
from prunus.report.html import render, write_report
from prunus.report.numbers import (
    byte_size,
    count,
    duration,
    percent,
    plus_minus,
    ratio,
    spread,
)
from prunus.report.table import console_table, markdown

__all__ = [
    "Figure",
    "Highlight",
    "Report",
    "ReportError",
    "Table",
    "accuracy_against_sparsity",
    "byte_size",
    "console_table",
    "count",
    "duration",
    "latency_bars",
    "layer_sparsity",
    "markdown",
    "mask_picture",
    "percent",
    "plus_minus",
    "ratio",
    "render",
    "spread",
    "write_report",
]

"""One table for the terminal and for Markdown."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from prunus.report.content import Cell, Table


def cell_text(cell: Cell) -> str:
    """Text of a cell: ints with separators, floats with four significant digits, None a dash."""
    if cell is None:
        return "—"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else cell


def console_table(table: Table, console: Console | None = None) -> None:
    """Print a table to the terminal; numbers right-aligned."""
    rich = RichTable(title=escape(table.title) or None, title_justify="left", title_style="bold")
    if table.note:
        rich.caption, rich.caption_justify = escape(table.note), "left"
    for column, numeric in zip(table.columns, table.numeric(), strict=True):
        rich.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(escape(cell_text(cell)) for cell in row))
    (console or Console()).print(rich)


def markdown(table: Table) -> str:
    """The table as GitHub-flavoured Markdown, with its title above and its note below."""
    rows = [[_markdown_cell(cell_text(cell)) for cell in row] for row in table.rows]
    head = [_markdown_cell(column) for column in table.columns]
    rule = ["---:" if numeric else "---" for numeric in table.numeric()]
    lines = [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]
    title = [f"**{table.title}**", ""] if table.title else []
    note = ["", table.note] if table.note else []
    return "\n".join([*title, *lines, *note]) + "\n"


def _markdown_cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

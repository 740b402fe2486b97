from __future__ import annotations

import io

import pytest
from rich.console import Console

from prunus.errors import ShapeError
from prunus.report import Table, console_table, markdown

TABLE = Table(
    "Sizes [bold]",
    ["", "dense", "why"],
    [["parameters", 1234567, "a|b"], ["slack", 0.123456, "[red]x[/red]"], ["gone", None, "y"]],
    note="a [note]",
)


def test_markdown_by_hand():
    assert markdown(TABLE) == (
        "**Sizes [bold]**\n"
        "\n"
        "|  | dense | why |\n"
        "| --- | ---: | --- |\n"
        "| parameters | 1,234,567 | a\\|b |\n"
        "| slack | 0.1235 | [red]x[/red] |\n"
        "| gone | — | y |\n"
        "\n"
        "a [note]\n"
    )


def test_the_terminal_shows_every_cell_and_no_markup_is_obeyed():
    out = io.StringIO()
    console_table(TABLE, Console(file=out, width=80, force_terminal=False))
    text = out.getvalue()
    for part in ("Sizes [bold]", "1,234,567", "0.1235", "[red]x[/red]", "a [note]", "—"):
        assert part in text


def test_columns_of_numbers_are_told_from_text():
    table = Table("", ["n", "a", "b", "c"], [["1", 1, "2.5×", "csr"], ["2", None, "—", "9 x"]])
    assert table.numeric() == (False, True, True, False)


def test_rows_must_fit_the_columns():
    with pytest.raises(ShapeError, match="row 1 has 1 cells for 2"):
        Table("t", ["a", "b"], [["x", 1], ["y"]])

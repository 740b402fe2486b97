"""What a report says, as plain data; html.py and table.py only arrange it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prunus.errors import ShapeError

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns: the first column names the row, the others hold values.

    A float is shown with four significant digits, an int with thousands separators, None as a
    dash; what needs a unit comes as text (see numbers.py). Columns of numbers align right.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        """Raise ShapeError if a row is not as long as the columns."""
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ShapeError(
                    f"table {self.title!r}: row {number} has {len(row)} cells "
                    f"for {len(self.columns)} columns"
                )

    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether all its cells are numbers, possibly with a unit, or dashes."""
        return tuple(
            column > 0 and all(_is_number(row[column]) for row in self.rows)
            for column in range(len(self.columns))
        )


def _is_number(cell: Cell) -> bool:
    return not isinstance(cell, str) or cell[:1] in "0123456789+-−—±<>≈~.∞"


@dataclass(frozen=True)
class Figure:
    """A picture: `image` is SVG text or a `data:image/png;base64,` address; `alt` describes it."""

    title: str
    image: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Highlight:
    """One number that the reader should see first, such as ("4.1×", "faster at batch 64")."""

    value: str
    label: str


@dataclass(frozen=True)
class Report:
    """A page: title, summary lines, highlights, tables, figures, and how it was made."""

    title: str
    summary: Sequence[str] = ()
    highlights: Sequence[Highlight] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

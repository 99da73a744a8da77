"""Text of explanations in a terminal: signed numbers, bars, and a table of objectives."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from armorm.progress import Terminal

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_RIGHT_EIGHTHS = " ▕▐█"

# Title, cell of a row, footer, and options of `rich.table.Table.add_column`.
Column = tuple[str, Callable[[Any], Any], str, Mapping[str, Any]]


def objective_table(rows: Iterable[Any], columns: Sequence[Column], others: Mapping[str, str] | None = None) -> Table:
    """A table with one line per row and a footer.

    Args:
        others: cells of one more line, by title of the column.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", show_footer=True)
    table.footer_style = "bold"
    for title, _, footer, options in columns:
        table.add_column(title, footer, no_wrap=True, **options)
    for row in rows:
        table.add_row(*(cell(row) for _, cell, _, _ in columns))
    if others:
        table.add_row(*(others.get(title, "") for title, *_ in columns), style="dim")
    return table


def as_text(shown: Any) -> str:
    """What a terminal shows, 120 columns wide, without colours."""
    console = Terminal(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign; zero is +0.0000."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def signed_bar(value: float, width: int) -> Text:
    """A bar from the middle, to the right and green for value > 0, to the left and red for value < 0.

    Args:
        value: -1 to 1.
        width: characters, even.
    """
    half = width // 2
    eighths = round(min(abs(value), 1.0) * half * 8)
    full, rest = divmod(eighths, 8)
    if value >= 0:
        right = "█" * full + (_EIGHTHS[rest] if rest else "")
        return Text.assemble((" " * half, ""), ("│", "dim"), (right.ljust(half), "green"))
    left = (_RIGHT_EIGHTHS[(rest + 2) // 3] if rest else "") + "█" * full
    return Text.assemble((left.rjust(half), "red"), ("│", "dim"), (" " * half, ""))

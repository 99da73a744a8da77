"""Output of a command: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from armorm.files import json_text, write_text
from armorm.progress import Terminal, say

WIDTH = 80


def emit(data: Any, *shown: RenderableType, as_json: bool, indent: int | None = 1, width: int | None = None) -> None:
    """Print `data` as JSON, or the tables and lines that show it.

    Args:
        indent: of the JSON; None prints it on one line.
        width: maximum width of the tables in characters; by default that of the terminal.
    """
    if as_json:
        print(json_text(data, indent))
        return
    console = Terminal(highlight=False)
    for part in shown:
        is_line = isinstance(part, str)
        console.print(part, markup=not is_line, soft_wrap=is_line, width=width and min(width, console.width))


def write_rejected(path: Path, rejected: Iterable[tuple[int, str]]) -> None:
    """List rejected rows as JSON lines with `row` and `reason`."""
    write_text(path, "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in sorted(rejected)))


def write_page(path: Path, html: str) -> None:
    """Write an HTML page and report where."""
    write_text(path, html)
    say(f"wrote {path}")


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are left-aligned and the others right-aligned."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        found.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return found


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values."""
    found = Table(box=None, pad_edge=False, show_header=False)
    found.add_column(style="bold")
    found.add_column()
    for name, value in rows:
        found.add_row(name, Text(value))
    return found

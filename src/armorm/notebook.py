"""Compact HTML for notebooks: a title, a table, a note; and where to display it.

Styles are written into the elements and leave colours to the notebook, so that the output is legible on light and dark
pages and in notebooks that drop style sheets. All texts are escaped.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup
from rich.console import RenderableType

from armorm.progress import Terminal

MOST_ROWS = 12
_BLUE, _ORANGE = "#3b82f6", "#ea7a35"


def html_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "", *, left: Sequence[int] = (0,)
) -> str:
    """A table as HTML.

    Args:
        title: a line above it.
        rows: cells, texts or `Markup`.
        note: a line below it.
        left: positions of the columns that are left-aligned; the others are right-aligned.
    """
    cell = Markup('<td style="text-align:{};padding:.1em .7em .1em 0;white-space:nowrap">{}</td>')
    head = Markup('<th style="text-align:{};padding:.1em .7em .1em 0;font-weight:600">{}</th>')
    sides = ["left" if place in left else "right" for place in range(len(columns))]
    line = Markup("<tr>{}</tr>")
    top = line.format(Markup("").join(head.format(*pair) for pair in zip(sides, columns, strict=True)))
    body = Markup("").join(
        line.format(Markup("").join(cell.format(*pair) for pair in zip(sides, row, strict=True))) for row in rows
    )
    found = Markup('<div style="max-width:60rem"><p style="margin:.3em 0;font-weight:600">{}</p>').format(title)
    if rows:
        found += Markup('<div style="overflow-x:auto"><table style="border-collapse:collapse;font-size:.92em">')
        found += Markup("<thead>{}</thead><tbody>{}</tbody></table></div>").format(top, body)
    if note:
        found += Markup('<p style="margin:.3em 0;opacity:.75;font-size:.9em">{}</p>').format(note)
    return str(found + Markup("</div>"))


def bar(value: float) -> Markup:
    """A bar from the middle of its cell: to the right for values above 0, to the left below; -1 to 1."""
    width, side = 50 * min(abs(value), 1.0), "left" if value >= 0 else "right"
    inner = f"position:absolute;top:.2em;bottom:.2em;{side}:50%;width:{width:.1f}%;"
    inner += f"background:{_BLUE if value >= 0 else _ORANGE}"
    outer = "position:relative;width:9em;height:1.1em;border-left:0;"
    outer += "background:linear-gradient(currentColor,currentColor) center/1px 100% no-repeat"
    return Markup(f'<div role="img" aria-label="{value:+.2f}" style="{outer}"><span style="{inner}"></span></div>')


def display(html: str, lines: Callable[[int], Sequence[RenderableType]]) -> None:
    """Show HTML in the notebook that runs this code, or print the lines for a width in characters."""
    shell = sys.modules.get("IPython")
    if shell is not None and hasattr(shell.get_ipython(), "kernel"):
        shown = importlib.import_module("IPython.display")
        shown.display(shown.HTML(html))
        return
    console = Terminal(highlight=False)
    for line in lines(console.width):
        console.print(line)


def shortened(text: str, most: int = 60) -> str:
    """A text on one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"

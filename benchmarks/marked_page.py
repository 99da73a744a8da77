"""Pages whose tables and sentences come from results: everything between marks is replaced, never edited by hand.

<!-- begin NAME -->
...
<!-- end NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from armorm.files import write_text


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Rewrite the marked parts of a page.

    Raises:
        SystemExit: for a mark without a part.
    """

    def filled(found: re.Match[str]) -> str:
        name = found[1]
        if name not in parts:
            raise SystemExit(f"{page}: mark {name!r}, expected one of {', '.join(parts)}")
        return f"<!-- begin {name} -->\n{parts[name]}\n<!-- end {name} -->"

    text = page.read_text(encoding="utf-8")
    write_text(page, re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", filled, text, flags=re.DOTALL))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is a label, the others are numbers."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

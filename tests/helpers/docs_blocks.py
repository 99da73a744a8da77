"""The blocks of the pages that a reader would run, and where they are run.

The `Block`s of a page are its programs (`python`) and its commands (`bash`, and blocks without a language that begin with
a command), each with the reason if it is not run.

A block is not run when the line before it is `<!-- not run: REASON -->`. Blocks of one page run in order in one folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = ("armorm", "python", "make", "pip", "curl", "head", "docker")
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*?) -->\n)?^```(?P<language>[a-z]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page, line: where it stands.
        language: `console` (commands) or `python`.
        text: the commands, one a line, or the program.
        reason: why it is not run, '' where it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str


def blocks(path: Path) -> list[Block]:
    """The runnable blocks of a page."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        body = match["text"]
        if match["language"] not in ("python", "bash", "sh", ""):
            continue
        if not match["language"] and body.split(maxsplit=1)[:1] and body.split(maxsplit=1)[0] not in COMMANDS:
            continue
        language = "python" if match["language"] == "python" else "console"
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(path.relative_to(DOCS).as_posix(), line + 1, language, body, match["reason"] or ""))
    return found

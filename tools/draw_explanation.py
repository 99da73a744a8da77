"""Draws docs/images/explained.svg, the picture of the README: question, two answers and verdict, as in the terminal.

python tools/draw_explanation.py
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from armorm import ArmoRM
from armorm.files import write_text

TARGET = Path("docs/images/explained.svg")
PAIRS = Path("benchmarks/everyday/everyday_pairs.jsonl")
PAIR = "dog-died"

if __name__ == "__main__":
    rows = map(json.loads, PAIRS.read_text(encoding="utf-8").splitlines())
    pair = next(row for row in rows if row["id"] == PAIR)
    rm = ArmoRM.from_pretrained(dtype="float32", device="cpu")
    console = Console(record=True, width=104, file=io.StringIO(), highlight=False)
    texts = Table.grid(padding=(0, 2))
    for name, text in (("prompt", pair["prompt"]), ("A", pair["chosen"]), ("B", pair["rejected"])):
        texts.add_row(f"[bold]{name}[/]", Text(text))
    console.print(texts, "")
    console.print(rm.compare(pair["prompt"], pair["chosen"], pair["rejected"]))
    # (Without the web fonts that rich links to, so that the picture loads nothing from other hosts.)
    picture = console.export_svg(title="armorm compare")
    write_text(TARGET, re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))
    print(f"wrote {TARGET}")

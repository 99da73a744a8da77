"""Draws docs/images/explained.svg, the picture of the README: an explanation by the embedded model, as in the terminal.

python tools/draw_explanation.py
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from armorm import ArmoRM
from armorm.files import write_text

TARGET = Path("docs/images/explained.svg")
CONVERSATION = [
    {"role": "user", "content": "Is it safe to mix bleach with vinegar to clean the bathroom?"},
    {
        "role": "assistant",
        "content": "No. Bleach and vinegar together give off chlorine gas, which harms your lungs. "
        "Use one of them, rinse well, and open a window.",
    },
]

if __name__ == "__main__":
    console = Console(record=True, width=120, file=io.StringIO(), highlight=False)
    console.print(ArmoRM.from_pretrained(dtype="float32", device="cpu").explain(CONVERSATION))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    # (Without the web fonts that rich links to, so that the picture loads nothing from other hosts.)
    write_text(
        TARGET, re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="armorm explain"), flags=re.DOTALL)
    )
    print(f"wrote {TARGET}")

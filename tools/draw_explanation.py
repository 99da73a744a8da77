"""Draw the README's picture: an explanation, as the terminal shows it.

In:  the embedded reward model.
Out: `docs/images/explained.svg`.

    python tools/draw_explanation.py
"""

from __future__ import annotations

import io
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
    console = Console(record=True, width=92, file=io.StringIO(), highlight=False)
    console.print(ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu").explain(CONVERSATION))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    write_text(TARGET, console.export_svg(title="armorm explain"))
    print(f"wrote {TARGET}")

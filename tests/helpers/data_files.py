"""Small files for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from armorm.data.sources import Location


def write_rows(path: Path, *rows: dict[str, Any]) -> Location:
    """Rows as JSON lines, one a line, and where they are."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Location.find(path)

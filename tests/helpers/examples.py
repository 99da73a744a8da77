"""How many inputs the tests of broken input draw."""

from __future__ import annotations

import os


def examples(usual: int) -> int:
    """`usual`, or ARMORM_EXAMPLES if that is more (`benchmarks/broken_input.py` sets it)."""
    return max(usual, int(os.environ.get("ARMORM_EXAMPLES", "0")))

"""Kills, signals and full disks, in a small size; `benchmarks/reliability.py` alone does the full one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "reliability.py"


@pytest.mark.slow
def test_commands_that_are_stopped_end_with_the_same_bytes(tmp_path):
    disks = "5" if os.getuid() == 0 and os.access("/dev", os.W_OK) else "0"
    counts = ["--kills", "5", "--signals", "5", "--full-disks", disks, "--rows", "260", "--limit", "10"]
    output = tmp_path / "found.json"
    found = subprocess.run(
        [sys.executable, PROGRAM, *counts, "--output", output], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    shows = json.loads(output.read_text())["shows"]
    assert sum(show["same"] for show in shows) == 10 + int(disks)

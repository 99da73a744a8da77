"""The script of the GPU benchmarks, tried on a processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_step_is_recorded_and_none_is_run_twice(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--only", "kernels", "extraction"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {name: step["outcome"] for name, step in steps.items()} == {"kernels": "done", "extraction": "done"}
    kinds = json.loads((tmp_path / "kernels.json").read_text())["armorm-tiny"]["long-prompts"]["tree"]["kinds"]
    assert kinds["matrix products"] > 0.1 and sum(kinds.values()) == pytest.approx(1)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert again.stdout.count("is there") == 2

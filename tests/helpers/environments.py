"""Programs run under other versions of transformers, each version in an environment of its own (`make test-compat`).

Such an environment has its own transformers, tokenizers and huggingface-hub, and takes torch and the rest from the
main one through a path file, which stands behind its own packages. armorm is in none of them: a program that
needs the library gets the source folder, every other one shows what a machine without armorm can do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CURRENT, NEWER, OLDER = "current", "4.57", "4.51"


def environment(name: str) -> Path:
    """The folder of an environment, next to the main one; a test fails if it is not built."""
    folder = Path(f"{sys.prefix}-compat", name)
    if not (folder / ".ready").exists():
        pytest.fail(f"no environment at {folder}: `make test-compat` builds it")
    return folder


def interpreter(version: str) -> Path:
    """The Python with a version of transformers."""
    return Path(sys.executable) if version == CURRENT else environment(f"transformers-{version}") / "bin" / "python"


def started(version: str, arguments: list[str], modules: Path, *, library: bool) -> subprocess.CompletedProcess[str]:
    """Run a Python with arguments, offline.

    Args:
        modules: folder for the copies that transformers makes of remote code.
        library: whether armorm can be imported.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(modules / version),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src") if library else "",
    }
    return subprocess.run(
        [str(interpreter(version)), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **settings},
    )


def results(version: str, program: str, task: dict[str, Any], folder: Path, *, library: bool = False) -> dict[str, Any]:
    """What a program of this folder writes down about a task; both are JSON."""
    given, found = folder / f"task-{version}.json", folder / f"results-{version}.json"
    given.write_text(json.dumps(task))
    path = Path(__file__).parents[1] / "compat" / program
    done = started(version, [str(path), str(given), str(found)], folder / "modules", library=library)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(found.read_text())

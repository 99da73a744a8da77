"""Folders that are made once for all workers of a test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], object]) -> Path:
    """The folder `name`, filled by whichever worker needs it first; the others wait for it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            folder.mkdir()
            fill(folder)
            done.touch()
    return folder

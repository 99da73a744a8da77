"""Peak resident memory of a process, and the environment of one that measures its own.

`ru_maxrss` is no measure of a process that a larger one has started: Linux hands the parent's own peak down when the
child's program begins. `VmHWM` belongs to the program.
"""

from __future__ import annotations

import os
from pathlib import Path


def peak_bytes() -> int:
    """The most memory that this process has had, bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def environment() -> dict[str, str]:
    """This environment, in which a child process can import the modules of this folder."""
    places = (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)}

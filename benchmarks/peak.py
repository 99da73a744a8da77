"""Peak resident memory of a process, and the environment for a child process that measures its own.

`ru_maxrss` does not work for a process that a larger one has started: Linux passes the parent's peak on to the child.
`VmHWM` belongs to the program.
"""

from __future__ import annotations

import os
from pathlib import Path


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def environment() -> dict[str, str]:
    """This environment, extended so that a child process can import the modules of this folder."""
    places = (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(place for place in places if place)}

"""A lock on a folder, so that two runs never write into it at once.

The lock is one of the kernel (`flock`) on a file in the folder and ends with the process, however that ends. The file
stays and names the process that held it last.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from armorm.errors import OutputError
from armorm.files import output_errors
from armorm.progress import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
STALE_SECONDS = 3600  # temporary files that nobody has written to for so long are of killed processes
_TEMPORARY = re.compile(r"\..*\.\d+\.tmp")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder, which is made if necessary; temporary files of killed processes are removed.

    Args:
        wait: until another process has released the lock.

    Yields:
        whether another process had held it.

    Raises:
        OutputError: if another process holds it, unless `wait`; or for a folder that cannot be written to.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file, waited = _acquire(folder, wait)
    try:
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name) and path.is_file() and _age(path) > STALE_SECONDS:
                path.unlink(missing_ok=True)
        yield waited
    finally:
        file.close()


def _acquire(folder: Path, wait: bool) -> tuple[IO[str], bool]:
    waited = False
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(open(folder / FILE, "a+", encoding="utf-8"))
            if not _take(file):
                waited = _report_holder(folder, file, wait, waited)
                time.sleep(0.5)
            elif _is_current(file, folder / FILE):
                file.truncate(0)
                file.write(f"process {os.getpid()}")
                file.flush()
                stack.pop_all()  # it stays open
                return file, waited


def _report_holder(folder: Path, file: IO[str], wait: bool, reported: bool) -> bool:
    file.seek(0)
    holder = file.read().strip() or "another process"
    if not wait:
        raise OutputError(folder, f"{holder} is writing here, expected to be alone; wait for it to end")
    if not reported:
        say(f"{folder}: waiting for {holder}, which is writing here")
    return True


def _take(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        say(f"{file.name}: cannot be locked ({error.strerror}): nothing keeps other runs out")
    return True


def _is_current(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at `path`, not one that its last holder deleted with the folder."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return False


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

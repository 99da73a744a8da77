"""SIGINT, SIGTERM and SIGHUP end a command at once, in one line that says what is kept: exit codes 130, 143 and 129.

The handler ends the process where it stands. Nothing is unwound, so no library can swallow the signal, turn it into
another error or print a traceback; and nothing is lost, because every file is complete under its name or absent
(`files.py`), which a kill needs anyway. Temporary files are removed. Python runs a handler only between its own
instructions; if the main thread is inside a call of a library (an import, a forward pass), a thread that the signal
wakes through `signal.set_wakeup_fd` ends the process after `GRACE_SECONDS`. Once the command has ended and Python shuts
down, signals are ignored: the work is done, and Python would restore their default actions, which end the process with
an error.

The command line installs this (`__main__.py`) before it imports anything else. Programs that import armorm keep their
own handlers, and so does whoever installs others later, such as the server.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

GRACE_SECONDS = 1.0
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):
    _WORDS[signal.SIGHUP] = "the terminal was closed"
_temporary: set[str] = set()
_kept = ""
_ending = threading.Lock()
_owner = 0  # the thread that ends the process


def install() -> None:
    """Handle the signals of this process, except those that its parent ignores (`nohup`)."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handled = [number for number in _WORDS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, _handle)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="armorm-signals", daemon=True).start()
    atexit.register(_ignore, handled)
    if hasattr(os, "register_at_fork"):  # children would wake the thread of this process
        os.register_at_fork(after_in_child=lambda: _restore(handled))


def keep(note: str) -> None:
    """Say what an interrupted command keeps, and how to go on: printed when it ends early."""
    global _kept  # noqa: PLW0603 (of the process, as signals are)
    from armorm.errors import printable

    _kept = printable(note)


def kept() -> str:
    """The note of `keep`, empty before the first."""
    return _kept


@contextmanager
def temporary_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Remove a file or folder when the block ends, or when the process is interrupted."""
    name = os.fspath(path)
    _temporary.add(name)
    try:
        yield
    finally:
        _remove(name)
        _temporary.discard(name)


def _handle(number: int, frame: object) -> None:
    _end(number)


def _watch(reader: int) -> None:
    while True:
        for number in os.read(reader, 16):
            if number in _WORDS and signal.getsignal(number) is _handle:
                time.sleep(GRACE_SECONDS)
                _end(number)


def _end(number: int) -> None:
    global _owner  # noqa: PLW0603
    if not _ending.acquire(blocking=False):
        if _owner != threading.get_ident():  # the other thread is at it
            time.sleep(GRACE_SECONDS)
            os._exit(128 + number)
        return
    _owner = threading.get_ident()
    for name in list(_temporary):
        with suppress(OSError):
            _remove(name)
    line = _WORDS[signal.Signals(number)] + (f"; {_kept}" if _kept else "")
    with suppress(OSError):
        # (A progress bar hides the cursor.)
        head = "\n\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{head}armorm: {line}\n".encode(errors="backslashreplace"))
    os._exit(128 + number)


def _remove(name: str) -> None:
    if os.path.isdir(name):  # noqa: PTH112 (pathlib is not imported before the signals are handled)
        import shutil

        shutil.rmtree(name, ignore_errors=True)
    elif os.path.lexists(name):
        os.unlink(name)  # noqa: PTH108


def _ignore(handled: list[signal.Signals]) -> None:
    for number in handled:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


def _restore(handled: list[signal.Signals]) -> None:
    signal.set_wakeup_fd(-1)
    for number in handled:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

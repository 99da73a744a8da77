"""Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds; nothing in the first two seconds.

A command that prints nothing for two seconds, because it imports or loads, says so on a terminal (`starting`).

Everything that is printed for people goes through a `Terminal`, which prints no control character of any text.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

from armorm.errors import printable

SILENT_SECONDS = 2.0
LINE_SECONDS = 10.0
STARTING, ERASE = "starting ...", "\r\x1b[K"
Advance = Callable[[int], None]


class Terminal(Console):
    """A console that prints control characters of texts as escapes (`errors.printable`); its own styles are kept."""

    silent = False  # all of them, see `silence`

    def __init__(self, *, quiet: bool = False, **options: Any) -> None:
        super().__init__(quiet=quiet or self.silent, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments whose texts are printable."""
        end_starting()
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def on_broken_pipe(self) -> None:
        """Leave it to the command line; messages whose reader has gone are no reason to end the work."""
        if not self.stderr:
            raise  # noqa: PLE0704 (called where the error is handled)


class _Note:
    """A text on a terminal, written after `SILENT_SECONDS` unless it was ended before."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._shown = self._ended = False
        self._timer = threading.Timer(SILENT_SECONDS, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if not self._ended:
                self._write(STARTING)
                self._shown = True

    def end(self) -> None:
        """Erase it, or never show it."""
        self._timer.cancel()
        with self._lock:
            if self._shown and not self._ended:
                self._write(ERASE)
            self._ended = True

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that has gone: nobody reads it
            self._stream.write(text)
            self._stream.flush()


_note: _Note | None = None


@contextmanager
def starting() -> Iterator[None]:
    """On a terminal, say after two seconds without a word that the work has started; until something is printed."""
    global _note  # noqa: PLW0603 (of the process, as its terminal is)
    if sys.stderr is not None and sys.stderr.isatty() and not Terminal(stderr=True).is_dumb_terminal:
        _note = _Note(sys.stderr)
    try:
        yield
    finally:
        end_starting()


def end_starting() -> None:
    """Erase the text of `starting`, before anything else is printed."""
    global _note  # noqa: PLW0603
    if _note is not None:
        _note.end()
        _note = None


def ignore(count: int) -> None:
    """An `Advance` for callers that show nothing."""


def silence() -> None:
    """Print nothing more in this process, one of several that do the same."""
    Terminal.silent = True


def say(line: str) -> None:
    """Print one line to stderr."""
    Terminal(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int, unit: str = "rows", full_rate: float | None = None) -> Iterator[Advance]:
    """Show the progress of a piece of work; yields a function to call with the number of units just done.

    Args:
        full_rate: units per second that the rate is shown as a share of, the forward rate of what is trained.
    """
    console = Terminal(stderr=True)
    print_line = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    start = time.monotonic()
    done = 0
    bar: Progress | None = None
    task = None
    next_line = start + LINE_SECONDS

    def share(rate: float) -> str:
        return f" ({rate / full_rate:.0%} of the forward rate)" if full_rate else ""

    def advance(count: int) -> None:
        nonlocal done, bar, task, next_line
        done += count
        now = time.monotonic()
        rate = done / max(now - start, 1e-9)
        if console.is_terminal:
            if bar is None and now - start > SILENT_SECONDS:
                bar = Progress(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[rate]}"),
                    TimeRemainingColumn(),
                    console=console,
                    transient=True,
                )
                bar.start()
                task = bar.add_task(description, total=total, rate="")
            if bar is not None and task is not None:
                bar.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s{share(rate)}")
        elif now >= next_line and done < total:
            next_line = now + LINE_SECONDS
            left = (total - done) / rate if rate else float("inf")
            print_line(f"{description}: {done:,} of {total:,} {unit}, {rate:,.0f}/s{share(rate)}, {left:,.0f} s left")

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
        seconds = time.monotonic() - start
        if seconds > SILENT_SECONDS:
            average = f", {done / seconds:,.0f}/s{share(done / seconds)}" if full_rate else ""
            print_line(f"{description}: {done:,} {unit} in {seconds:,.1f} s{average}")

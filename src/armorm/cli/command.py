"""What every command does around its own work: outputs are checked before it, and an error after it is one line.

Parameters say by a mark in their annotation whether they name an output or an input (`options.Place`).
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn, get_type_hints

from rich.markup import escape

from armorm.cli.options import Place
from armorm.cli.output import require_outputs, write_out
from armorm.data.row_writer import require_row_format
from armorm.errors import ArmormError, OutputError, RecipeError
from armorm.interruption import keep, kept
from armorm.progress import Terminal, starting


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as a command line calls it."""

    @wraps(function)
    def run(*arguments: Any, **values: Any) -> None:
        keep("")
        try:
            places = _places(function, values)
            rows = places[Place.ROWS]
            require_outputs([*places[Place.FILE], *rows], places[Place.FOLDER], list(map(str, places[Place.INPUT])))
            for path in rows:
                require_row_format(path)
            with starting():
                function(*arguments, **values)
            if sys.stdout is not None:
                write_out("")  # what buffers hold
        except BrokenPipeError as error:
            if not _reader_is_gone():
                end(error)
            # The reader of the output has gone (`| head`), which is no error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except (ArmormError, OSError) as error:
            end(error)

    return run


def end(error: ArmormError | OSError) -> NoReturn:
    """Print an error as one line and end the process: exit code 2 for an invalid recipe, else 1."""
    note = f"; {kept()}" if isinstance(error, OutputError) and error.errno is not None and kept() else ""
    console = Terminal(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red]armorm:[/red] {escape(' '.join(str(error).split()) + note)}")
    if isinstance(error, OutputError) and sys.stdout is not None:
        _forget_buffered()
    sys.exit(2 if isinstance(error, RecipeError) else 1)


def _places(function: Callable[..., None], values: dict[str, Any]) -> dict[Place, list[Any]]:
    """The outputs and inputs among the values of a call."""
    found: dict[Place, list[Any]] = {place: [] for place in Place}
    for name, hint in get_type_hints(function, include_extras=True).items():
        given = values.get(name)
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, Place) and given is not None:
                found[mark] += given if isinstance(given, list) else [given]
    return found


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows; a captured or closed output
        return True


def _forget_buffered() -> None:
    """Let what could not be written to standard output not be tried again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

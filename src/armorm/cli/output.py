"""Output of a command: tables for people, JSON for programs; where it goes is checked before the work."""

from __future__ import annotations

import filecmp
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from armorm.data.layout_detection import is_conversation_column
from armorm.data.row_writer import WriteRow, row_writer
from armorm.errors import DataError, OutputError
from armorm.files import existing_parent, json_text, output_target, write_text
from armorm.interruption import keep
from armorm.progress import Terminal, end_starting, say
from armorm.saved_chunks import SavedChunks, already_exists, partial_folder, work_folder

WIDTH = 80
SHOWN_REJECTIONS = 5
AGAIN = "run the same command again to go on"


def emit(data: Any, *shown: RenderableType, as_json: bool, indent: int | None = 1, width: int | None = None) -> None:
    """Print `data` as JSON, or the tables and lines that show it.

    Args:
        indent: of the JSON; None prints it on one line.
        width: maximum width of the tables in characters; by default that of the terminal.

    Raises:
        OutputError, BrokenPipeError: as of `write_out`.
    """
    if as_json:
        write_out(json_text(data, indent) + "\n")
        return
    with standard_output():
        console = Terminal(highlight=False)
        for part in shown:
            is_line = isinstance(part, str)
            console.print(part, markup=not is_line, soft_wrap=is_line, width=width and min(width, console.width))


def write_out(text: str) -> None:
    """Write text to standard output at once.

    Raises:
        OutputError: if it cannot be written.
        BrokenPipeError: if its reader has gone.
    """
    with standard_output() as file:
        file.write(text)
        file.flush()


@contextmanager
def standard_output() -> Iterator[TextIO]:
    """Standard output; errors of writing to it name it, except `BrokenPipeError`."""
    if sys.stdout is None:
        raise OutputError("standard output", "is closed")
    end_starting()
    try:
        yield sys.stdout
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError("standard output", error) from None


@contextmanager
def output_rows(path: Path | None) -> Iterator[WriteRow]:
    """A function that writes rows: to a file that appears when the block ends, or to standard output at once.

    Raises:
        OutputError: if standard output is closed.
    """
    if path is not None:
        with row_writer(path) as write:
            yield write
        return
    write_out("")  # a closed output is found before the work
    yield lambda row: write_out(json_text(row) + "\n")


@contextmanager
def resumable(
    outputs: Sequence[Path | None], identity: Any, *, force: bool
) -> Iterator[tuple[SavedChunks, list[Path | None]]]:
    """Chunks of rows, the finished ones of which are kept next to the first output until the block ends.

    Args:
        outputs: each None if it is not written to a file.
        identity: as of `SavedChunks`.
        force: as of `require_unused`.

    Yields:
        the chunks, and where each output is to be written: at its path, or next to the chunks if it exists already.
        Such an output must be that of these chunks, by a run that was killed at its very end.

    Raises:
        DataError: if it is not, before any chunk is computed.
    """
    files = [path for path in outputs if path is not None]
    with work_folder(files[0] if files else None) as folder:
        if folder is None:
            keep("the rows written so far are complete; with --output FILE an interrupted run resumes")
            for path in files:
                require_unused(path, force)
            yield SavedChunks(None, identity), list(outputs)
            return
        keep(f"finished rows are kept in {folder}; {AGAIN}")
        again = {path: folder / f"again-{path.name}" for path in files if not force and path.is_file()}
        chunks = SavedChunks(folder, identity, complete=next(iter(again), None))
        yield chunks, [path and again.get(path, path) for path in outputs]
        for path, written in again.items():
            if not filecmp.cmp(path, written, shallow=False):
                raise already_exists(path)


def require_outputs(outputs: Sequence[Path], folders: Sequence[Path] = (), inputs: Sequence[str] = ()) -> None:
    """Check before any work that outputs can be written and are neither inputs nor each other, under any name.

    Args:
        outputs: files.
        folders: for models or features; they may exist.
        inputs: files, folders or anything else, which is no place.

    Raises:
        OutputError: with the path.
    """
    for path in outputs:
        target = output_target(path)
        if target is not None and not target.exists():
            _require_writable_folder(path, target.parent)
    for folder in folders:
        _require_writable_folder(folder, folder)
    places = [(path, "is also an output") for path in (*outputs, *folders)]
    for (one, _), (other, problem) in combinations(places, 2):
        if _same(one, other):
            raise OutputError(other, f"{problem}, as {one}; expected different names")
    for name in inputs:
        for path in (*outputs, *folders):
            if name != "-" and _same(path, Path(name)):
                raise OutputError(path, f"is the input {name}, which would be replaced; expected another name")


def _require_writable_folder(path: Path, folder: Path) -> None:
    parent = existing_parent(folder)
    if not parent.is_dir():
        raise OutputError(path, f"{parent} is a file, expected a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(path, f"{parent} is not writable")


def _same(one: Path, other: Path) -> bool:
    """Whether two names stand for one file or folder; devices and FIFOs may be given twice."""
    try:
        return one.samefile(other) and stat.S_IFMT(one.stat().st_mode) in (stat.S_IFREG, stat.S_IFDIR)
    except OSError:  # one of them does not exist
        try:
            return one.resolve() == other.resolve()
        except (OSError, RuntimeError):
            return False


def require_unused(path: Path | None, force: bool, kept_for: Path | None = None) -> None:
    """Check, before any work, that no file and no folder with files has the name of an output.

    Streams and devices (`/dev/stdout`, a FIFO) are written to, whatever `force` says.

    Args:
        kept_for: the first output of a command that keeps finished rows next to it; if there are any, `resumable`
            decides.

    Raises:
        DataError: if one has, and `force` is not given.
    """
    if path is None or force or (kept_for is not None and partial_folder(kept_for).is_dir()):
        return
    if (path.is_file() and output_target(path) is not None) or (path.is_dir() and any(path.iterdir())):
        raise already_exists(path)


def with_columns(entry: dict[str, Any], columns: Mapping[str, Any], *, texts: bool) -> dict[str, Any]:
    """An output row with the columns of the input; one whose name is taken is written `input_NAME`.

    Args:
        texts: also the columns of the conversation.
    """
    for name, value in columns.items():
        if texts or not is_conversation_column(name):
            taken = name in entry and entry[name] != value
            entry[f"input_{name}" if taken else name] = value
    return entry


def write_rejected(path: Path, rejected: Iterable[tuple[int, str]]) -> None:
    """List rejected rows as JSON lines with `row` and `reason`."""
    write_text(path, "".join(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in sorted(rejected)))


def say_rejected(errors: Sequence[DataError]) -> None:
    """Print the first few rows that were left out, with the reasons."""
    for error in errors[:SHOWN_REJECTIONS]:
        say(f"rejected: {error}")


def write_page(path: Path, html: str) -> None:
    """Write an HTML page and report where."""
    write_text(path, html)
    say(f"wrote {path}")


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are left-aligned and the others right-aligned."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        found.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    return found


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values."""
    found = Table(box=None, pad_edge=False, show_header=False)
    found.add_column(style="bold")
    found.add_column()
    for name, value in rows:
        found.add_row(name, Text(value))
    return found

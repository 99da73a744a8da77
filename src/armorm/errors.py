"""Exceptions: one family, each with a one-line message of where, what was found, and what was expected.

The command line prints that line; nothing that a user can cause ends in a traceback. Message texts of conversations may
be private and are never quoted in full: `shown` truncates values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path


class ArmormError(Exception):
    """Base of all errors that armorm raises; `str(error)` is a single line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class ConversationError(ArmormError, ValueError):
    """A conversation that cannot be scored: wrong roles, an empty response, a turn the template rejects.

    Attributes:
        field: location in the conversation, such as `messages[2].role`; empty for the whole.
        problem: what is wrong, without the location.
    """

    def __init__(self, problem: str, field: str = "") -> None:
        self.field = field
        self.problem = problem
        super().__init__(f"{field}: {problem}" if field else problem)


class DataError(ArmormError, ValueError):
    """An invalid row or file of data.

    Attributes:
        file: path or hub id.
        row: 1-based row of the file (of JSON lines: line), or None for the file as a whole.
        field: column or location in the row; empty for the whole row.
        problem: what was found and what was expected.
    """

    def __init__(self, problem: str, *, file: str | Path = "", row: int | None = None, field: str = "") -> None:
        self.file, self.row, self.field, self.problem = str(file), row, field, problem
        places = [str(file)] if str(file) else []
        places += [f"row {row}"] if row is not None else []
        places += [f"field '{field}'"] if field else []
        super().__init__(f"{', '.join(places)}: {problem}" if places else problem)

    @property
    def reason(self) -> str:
        """The problem, with the column that it is in."""
        return f"{self.field}: {self.problem}" if self.field else self.problem


class LayoutError(DataError):
    """A row of another layout than is read here."""


class UnreachableSetError(DataError):
    """A hub set that is neither cached nor reachable."""


class RecipeError(ArmormError, ValueError):
    """An invalid recipe, found before any work starts; the message names the key by its path in the file."""


class TemplateError(ArmormError, ValueError):
    """A tokenizer without a usable chat template: none at all, or no gate position in it."""


class BackboneError(ArmormError, ValueError):
    """A model that cannot serve as a backbone: not a decoder, or weights that do not fit."""


class CheckpointError(ArmormError, ValueError):
    """A checkpoint that cannot be loaded; names every tensor that is missing, unexpected or of another shape."""


class StoreError(ArmormError, ValueError):
    """A feature store that is damaged, or that belongs to another backbone, template or length limit."""


class FitError(ArmormError, ValueError):
    """Data from which a head cannot be learned: no ratings, no variance, no pairs."""


class OutputError(ArmormError, OSError):
    """A file that cannot be written, by its path and what the system says; or a name that is no place for output.

    Attributes:
        errno: of the system, None for a name that was rejected.
    """

    def __init__(self, path: str | Path, problem: str | OSError) -> None:
        super().__init__(f"{path}: {getattr(problem, 'strerror', None) or problem}")
        self.errno = getattr(problem, "errno", None)


class MissingExtraError(ArmormError, ImportError):
    """A missing optional dependency; the message names the extra that installs it."""


def printable(text: str) -> str:
    """Text with control characters as escapes (`\\x1b`), except line feed and tab, so that no terminal obeys them.

    Bytes of a file name that are not text (lone surrogates) are escaped too.
    """
    return _CONTROL.sub(_escaped, text)


# C0, DEL and C1 control characters, controls of the direction of text, and lone surrogates.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def read_fault(path: str | Path, error: Exception) -> str:
    """Why a file cannot be read, for a message that starts with its name."""
    if isinstance(error, FileNotFoundError):
        return f"no such file or folder; looked for {Path(path).absolute()}"
    return f"cannot be read: {error}"


def shown(value: object, limit: int = 60) -> str:
    """`repr` of a value, truncated to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known name, or an empty string.

    A name is also compared with what follows the source in `source-name` (`is_safe` with `beavertails-is_safe`).
    """
    names = list(known)
    by_end = {other.partition("-")[2]: other for other in reversed(names) if "-" in other}
    matches = difflib.get_close_matches(name, [*names, *by_end], n=1, cutoff=0.6)
    return f" (did you mean {matches[0] if matches[0] in names else by_end[matches[0]]}?)" if matches else ""

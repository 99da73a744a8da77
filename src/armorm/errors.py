"""One exception family: every refusal is one line that says where, what was found, what was expected.

In:  the place of a fault (file, row, field) and what is wrong with it.
Out: an exception whose text is a single line a person can act on. The command line prints that line
     and stops; nothing that a user can cause ends in a traceback.

Message texts of conversations are never quoted in full: they may be private. `shown` cuts values short.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class ArmormError(Exception):
    """Base of every error that armorm raises on purpose; `str(error)` is a single line."""

    def __init__(self, message: str) -> None:
        # A file's name may hold bytes that are no text; the line must be printable everywhere.
        super().__init__(" ".join(message.split()).encode("utf-8", "backslashreplace").decode())


class ConversationError(ArmormError, ValueError):
    """A conversation that cannot be scored: wrong roles, an empty response, a turn the template refuses.

    Attributes:
        field: the place inside the conversation, such as `messages[2].role`; empty when it is the whole.
        problem: what is wrong, without the place.
    """

    def __init__(self, problem: str, field: str = "") -> None:
        self.field = field
        self.problem = problem
        super().__init__(f"{field}: {problem}" if field else problem)


class DataError(ArmormError, ValueError):
    """A row or file of data that is refused.

    Attributes:
        file: path or hub id.
        row: 1-based row (line) of the file, or None for the file as a whole.
        field: column or place inside the row; empty when it is the whole row.
        problem: what was found and what was expected.
    """

    def __init__(self, problem: str, *, file: str | Path = "", row: int | None = None, field: str = "") -> None:
        self.file, self.row, self.field, self.problem = str(file), row, field, problem
        places = [str(file)] if str(file) else []
        places += [f"row {row}"] if row is not None else []
        places += [f"field '{field}'"] if field else []
        super().__init__(f"{', '.join(places)}: {problem}" if places else problem)


class RecipeError(ArmormError, ValueError):
    """A recipe that is refused before any work starts; the text names the key by its path in the file."""


class TemplateError(ArmormError, ValueError):
    """A tokenizer whose chat template cannot be used: none at all, or no place for the gate."""


class BackboneError(ArmormError, ValueError):
    """A model that cannot serve as a backbone: not a decoder, or weights that do not fit."""


class CheckpointError(ArmormError, ValueError):
    """A checkpoint that cannot be loaded; names every tensor that is missing, unexpected or misshapen."""


class StoreError(ArmormError, ValueError):
    """A feature store that is damaged, or that belongs to another backbone, template or length limit."""


class FitError(ArmormError, ValueError):
    """Data from which a head cannot be learned: no ratings, no variance, no pairs."""


class MissingExtraError(ArmormError, ImportError):
    """An optional dependency is absent; the text says which extra installs it."""


def shown(value: object, limit: int = 60) -> str:
    """`repr` of a value, cut to `limit` characters: enough to recognise it, not enough to leak a text."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known name, or an empty string when none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]}?)" if matches else ""

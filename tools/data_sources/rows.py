"""Rows of the converted data sets: schema, split rule, writing and comparing.

A row of `ratings/` has `messages`, one column per objective and `split`; a row of `preferences/` has `prompt`, `chosen`,
`rejected` and `split`; a row of `benchmarks/` has no split. Files are gzipped JSON lines and depend on the rows alone.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Message = dict[str, str]


class SourceError(ValueError):
    """A clone lacks a file, or a file is not in the layout that is read."""


def user(text: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": text.strip()}


def assistant(text: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": text.strip()}


def pair(prompt: list[Message], chosen: str, rejected: str, **columns: Any) -> Row:
    """A row of `preferences/` or `benchmarks/`; `columns` follow the responses."""
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **columns}


def normalised(text: str) -> str:
    """Lower case, runs of other characters than letters, digits and underscores as one space."""
    return re.sub(r"\W+", " ", text.lower()).strip()


def split_of(text: str) -> str:
    """`test` for a tenth of all texts, by their SHA-1, otherwise `train`."""
    return "test" if int(hashlib.sha1(normalised(text).encode()).hexdigest(), 16) % 10 == 0 else "train"


def last_prompt(row: Row) -> str:
    """The normalised turn before the response."""
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return normalised(turns[-1]["content"]) if turns else ""


def has_response(row: Row) -> bool:
    """Whether no response is empty, and chosen and rejected differ."""
    if "chosen" not in row:
        return bool(row["messages"][-1]["content"])
    chosen, rejected = row["chosen"][-1]["content"], row["rejected"][-1]["content"]
    return bool(chosen and rejected) and chosen != rejected


def read_text(path: Path) -> str:
    """Text of a file of a clone, gzipped or not; raises SourceError where it is absent."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file; the clone is incomplete or of another commit")
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def read_json(path: Path) -> Any:
    """The JSON value of a file of a clone."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}: not JSON ({error})") from error


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON values of a file with one value per line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"{path}, line {number}: not JSON ({error})") from error


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write gzipped JSON lines; equal rows give equal bytes. Returns the number of rows."""
    buffer = io.BytesIO()
    count = 0
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            count += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)
    return count


def compared(path: Path, reference: Path) -> tuple[int, int, int]:
    """Numbers of rows that are equal, missing from `path`, and only in `path`; the order of rows and columns is ignored."""
    built, known = (Counter(json.dumps(row, sort_keys=True) for row in read_lines(file)) for file in (path, reference))
    return (built & known).total(), (known - built).total(), (built - known).total()

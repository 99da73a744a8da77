"""The one reader of rows: a path, a hub id, standard input or an object in memory, resolved to a `Location`.

    for row in Location.find("ratings.csv").rows():
        row.conversation(), row.value("helpful"), row.columns

`rows` reads files of every kind (data/rows.py), hub sets and folders (data/hub.py), DataFrames and Datasets, and brings
each row to standard form (data/layout_detection.py), so that every command and function takes the same layouts. Only
published sets, whose layout is known, are read as they are (`published_rows`).

`find_sources` resolves the data of a benchmark: files, folders, hub ids, or the published sets. In a folder of data
files it takes the files of the published splits (`filtered-00000.parquet`) if there are any, else all of them, sorted
by name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from armorm.data.rows import SUFFIXES, Layout, Row, file_rows, object_rows, stream_rows, valid_rows
from armorm.errors import DataError, nearest, shown
from armorm.progress import say

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Sets inside the package: right answers, and answers with a rating of 0 or 1.
_EMBEDDED = {
    name: Path(__file__).with_name(f"{name.replace('-', '_')}.jsonl") for name in ("plain-answers", "plain-replies")
}
STANDARD_INPUT = "standard input"
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Location:
    """Where rows are.

    Attributes:
        name: path or hub id, as the user wrote it.
        path: the existing file or folder, None for a hub id.
        subset, split, revision, data_dir: of a hub set or a folder.
        layout: of a published set, from a row to the rows that it contains; None recognises the layout.
        columns: the set's column of some roles, instead of those recognised by name.
        offline: make no requests to the hub.
        data: the object in memory, None for a path or a hub id.
    """

    name: str
    path: Path | None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    layout: Layout | None = None
    columns: Mapping[str, str] | None = None
    offline: bool = False
    data: Any = field(default=None, compare=False)

    @classmethod
    def find(cls, name: Any, root: Path | None = None, **options: Any) -> Location:
        """Resolve a path below `root`, the name of an embedded set, a hub id, a DataFrame, a Dataset or a list of rows.

        A relative path that leaves `root` is reported.

        Raises:
            DataError: for a text that is none of these, with the nearest name in its folder.
        """
        if not isinstance(name, (str, Path)):
            return cls(type(name).__name__, None, data=name, **options)
        text = str(name)
        if text == "-":
            raise DataError("can be read only once, expected a file here", file=STANDARD_INPUT)
        try:
            path = (root or Path()) / Path(text).expanduser()
            if path.exists():
                if root is not None and ".." in Path(text).parts:
                    _notice_outside(text, path, root)
                return cls(text, path, **options)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"no such file or folder ({reason})", file=shown(text)) from None
        if text in _EMBEDDED:
            return cls(text, _EMBEDDED[text], **options)
        if not _HUB_ID.fullmatch(text) or text.endswith(SUFFIXES):
            folder = path.parent
            hint = nearest(path.name, [entry.name for entry in folder.iterdir()]) if folder.is_dir() else ""
            raise DataError(f"no such file or folder{hint}; looked for {path.absolute()}", file=text)
        return cls(text, None, **options)

    @classmethod
    def standard_input(cls) -> Location:
        """Standard input, which can be read once."""
        return cls(STANDARD_INPUT, None, data=sys.stdin.buffer)

    def rows(self) -> Iterator[Row]:
        """Read the rows in order.

        Raises:
            DataError: for the first row that cannot be read, by file and row.
        """
        return valid_rows(self.rows_or_faults())

    def rows_or_faults(self) -> Iterator[Row | DataError]:
        """Read the rows in order; for a broken row its error is yielded and reading continues.

        Raises:
            DataError: for a file that cannot be read.
        """
        for row in self._raw_rows():
            if isinstance(row, DataError):
                yield row
                continue
            try:
                if self.layout is None:
                    meant = [row.standard(self.columns)]
                else:
                    meant = [Row(row.file, row.number, values, row.textual) for values in self.layout(row)]
            except DataError as error:
                yield error
                continue
            yield from meant

    def published_rows(self) -> Iterator[Row]:
        """Read the rows as they are, for readers that know their layout.

        Raises:
            DataError: for the first row that cannot be read, by file and row.
        """
        return valid_rows(self._raw_rows())

    def _raw_rows(self) -> Iterator[Row | DataError]:
        if self.data is not None:
            rows = stream_rows if self.name == STANDARD_INPUT else object_rows
            yield from rows(self.data, self.name)
        elif self.path is None:
            from armorm.data.hub import hub_rows

            yield from hub_rows(
                self.name,
                subset=self.subset,
                offline=self.offline,
                split=self.split,
                revision=self.revision,
                data_dir=self.data_dir,
            )
        elif self.path.is_dir():
            from armorm.data.hub import folder_rows

            if (self.path / "config.json").is_file() and any(self.path.glob("*.safetensors")):
                raise DataError("is a model, expected rows; a model is named by --model", file=self.name)
            yield from folder_rows(self.path, self.name, subset=self.subset, split=self.split, data_dir=self.data_dir)
        else:
            yield from file_rows(self.path)

    @property
    def available_offline(self) -> bool:
        """Whether the rows can be read without a network: a file, a folder, or a cached hub set."""
        if self.path is not None or self.data is not None:
            return True
        from armorm.data.hub import is_cached

        return is_cached(self.name, self.subset, revision=self.revision, data_dir=self.data_dir)


@dataclass(frozen=True)
class HubSet:
    """A published set.

    Attributes:
        id: on the hub.
        splits: of the benchmark; empty for the only one.
    """

    id: str
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Rows from one place.

    Attributes:
        location: of the rows.
        name: file name without suffixes, or the split.
    """

    location: Location
    name: str

    def rows(self) -> Iterator[Row]:
        """As `Location.published_rows`."""
        return self.location.published_rows()


@cache
def _notice_outside(name: str, path: Path, root: Path) -> None:
    """Say once that a relative path, perhaps of somebody else's recipe, is read from outside the data root."""
    if not path.resolve().is_relative_to(root.resolve()):
        say(f"notice: {name} is outside data_root {root}: reading {path.resolve()}")


def places_of(data: Any) -> list[Any]:
    """Data as a list of places: one path, DataFrame, Dataset or list of rows is one place."""
    if isinstance(data, (list, tuple)) and not any(isinstance(entry, Mapping) for entry in data):
        return list(data)
    return [data]


def find_sources(
    data: Sequence[Any], published: Sequence[HubSet] = (), also: Sequence[HubSet] = (), split: str | None = None
) -> list[Source]:
    """Resolve paths and hub ids.

    Args:
        data: paths, hub ids and objects in memory; empty for the published sets.
        published: sets of the benchmark.
        also: other sets whose splits are known.
        split: instead of the known splits.

    Raises:
        DataError: for a path that does not exist, a folder without data files, or a split of a file.
    """
    known = {hub.id: hub.splits for hub in (*published, *also)}
    splits = {name for hub in published for name in hub.splits}
    found: list[Source] = []
    for name in data or [hub.id for hub in published]:
        location = Location.find(name)
        if location.data is not None:
            found.append(Source(location, location.name))
        elif location.path is None:
            found += _of_splits(location, (split,) if split else known.get(str(name), ()), str(name).split("/")[-1])
        elif not location.path.is_dir():
            if split:
                raise DataError(f"is a file, expected a hub set or a folder to take split {split!r} of", file=name)
            found.append(Source(location, stem(location.path)))
        elif any((location.path / saved).exists() for saved in _SAVED):
            held = _splits_of(location.path)
            # (By default the test split, if the benchmark names no splits.)
            wanted = (split,) if split else tuple(name for name in held if name in (splits or {"test"}))
            found += _of_splits(location, wanted, stem(location.path))
        else:
            found += _of_folder(location.path, {split} if split else splits)
    return found


def stem(path: Path) -> str:
    """A file's name without the suffixes of data files."""
    ending = next((ending for ending in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(ending)), "")
    return path.name.removesuffix(ending)


def _of_splits(location: Location, splits: Sequence[str | None], name: str) -> list[Source]:
    if not splits:
        return [Source(location, name)]
    return [Source(Location(location.name, location.path, split=split), split or name) for split in splits]


def _of_folder(folder: Path, splits: set[str]) -> list[Source]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
    if not files:
        raise DataError(f"found no data files in the folder, expected {', '.join(SUFFIXES)}", file=folder)
    of_split = [path for path in files if any(path.name.startswith(f"{split}-") for split in splits)]
    return [Source(Location(str(path), path), stem(path)) for path in of_split or files]


def _splits_of(folder: Path) -> list[str]:
    path = folder / "dataset_dict.json"
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8")).get("splits", []))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot be read: {error}", file=path) from None

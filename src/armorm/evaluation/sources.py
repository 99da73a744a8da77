"""Sources: where the rows of a benchmark are, whatever the user names.

In:  hub ids, files, folders (saved by `datasets`, or holding data files), or nothing for the published set.
Out: `Source`s: a place to read rows from, and its own name (file or split), which some benchmarks need.

Of a folder of data files those are read that belong to the published split (`filtered-00000.parquet`),
where there are such; else all of them, in order of their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from armorm.data.rows import SUFFIXES, Location, Row
from armorm.errors import DataError

_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class HubSet:
    """A published set.

    Attributes:
        id: on the hub.
        splits: those that belong to the benchmark; empty for the only one.
    """

    id: str
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Rows from one place.

    Attributes:
        location: where they are.
        name: file name without its endings, or the split.
    """

    location: Location
    name: str

    def rows(self) -> Iterator[Row]:
        """Read them in order; a broken one stops the reading by name."""
        return self.location.rows()


def find_sources(
    data: Sequence[str | Path], published: Sequence[HubSet] = (), also: Sequence[HubSet] = (), split: str | None = None
) -> list[Source]:
    """Resolve what the user named.

    Args:
        data: paths and hub ids; empty for the published sets.
        published: of the benchmark.
        also: further sets whose splits are known.
        split: overrides the known ones.

    Raises:
        DataError: for a place that does not exist, a folder without data files, or a split of a file.
    """
    known = {hub.id: hub.splits for hub in (*published, *also)}
    splits = {name for hub in published for name in hub.splits}
    found: list[Source] = []
    for name in data or [hub.id for hub in published]:
        location = Location.find(name)
        if location.path is None:
            found += _of_splits(location, (split,) if split else known.get(str(name), ()), str(name).split("/")[-1])
        elif not location.path.is_dir():
            if split:
                raise DataError(f"is a file, expected a hub set or a folder to take split {split!r} of", file=name)
            found.append(Source(location, stem(location.path)))
        elif any((location.path / saved).exists() for saved in _SAVED):
            held = _splits_of(location.path)
            # (Of a set whose splits no benchmark names, the test split is what was held out.)
            wanted = (split,) if split else tuple(name for name in held if name in (splits or {"test"}))
            found += _of_splits(location, wanted, stem(location.path))
        else:
            found += _of_folder(location.path, {split} if split else splits)
    return found


def stem(path: Path) -> str:
    """A file's name without the endings of data files."""
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

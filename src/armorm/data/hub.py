"""Data sets read with the `datasets` library: hub sets (streamed, or from the local cache) and folders.

Whether the hub answers is tested first (`hub_access.py`). A set that is neither cached nor reachable is an error that
says where to put its files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from armorm.data.rows import Row, unreadable
from armorm.errors import DataError, UnreachableSetError, shown
from armorm.hub_access import hub_answers, without_hub

if TYPE_CHECKING:
    from pathlib import Path

_SAVED = ("dataset_dict.json", "state.json")


def folder_rows(path: Path, name: str, *, subset: str | None, split: str | None, data_dir: str | None) -> Iterator[Row]:
    """Rows of a folder of data files, or one saved by `datasets`.

    Raises:
        DataError: for an unknown split, or unreadable files.
    """
    import datasets

    try:
        if any((path / saved).exists() for saved in _SAVED):
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), subset, data_dir=data_dir, streaming=True)
    except _faults() as error:
        raise DataError(f"cannot be read as a datasets folder: {_described(error)}", file=name) from error
    yield from _rows_of(data, name, split)


def hub_rows(name: str, *, subset: str | None, offline: bool, split: str | None, **known: str | None) -> Iterator[Row]:
    """Rows of a hub set: streamed, or from the cache if the hub is unreachable or `offline` is set.

    Args:
        known: `revision` and `data_dir`.

    Raises:
        DataError: for a set that is neither cached nor reachable, an unknown split, or unreadable files.
    """
    import datasets

    try:
        if not offline and hub_answers():
            data = datasets.load_dataset(name, subset, streaming=True, split=split, **known)
        else:
            with without_hub():
                data = datasets.load_dataset(name, subset, split=split, **known)
    except (ConnectionError, FileNotFoundError) as error:
        if not offline and hub_answers():
            raise DataError(
                f"cannot be read as a hub set, and no such file or folder: {_described(error)}", file=name
            ) from error
        reason = "was not asked" if offline else "cannot be reached"
        raise UnreachableSetError(
            f"the set is not in the local cache and the hub {reason}; fetch it once with a connection, or put its "
            f"files into a folder {name} below data_root",
            file=name,
        ) from error
    except _faults() as error:
        raise DataError(
            f"cannot be read as a hub set, and no such file or folder: {_described(error)}", file=name
        ) from error
    yield from _rows_of(data, name, split)


def is_cached(name: str, subset: str | None, *, revision: str | None, data_dir: str | None) -> bool:
    """Whether a hub set can be read without a network."""
    import datasets

    try:
        with without_hub():
            datasets.load_dataset_builder(name, subset, revision=revision, data_dir=data_dir)
    except _faults():
        return False
    return True


def _rows_of(data: Any, name: str, split: str | None) -> Iterator[Row]:
    import datasets

    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        split = split or ("train" if "train" in data else next(iter(data)))
        if split not in data:
            raise DataError(f"found splits {', '.join(data)}, expected {split!r}", file=name)
        data = data[split]
    number = 0
    try:
        for number, values in enumerate(data, 1):
            yield Row(name, number, values)
    except _faults() as error:
        raise unreadable(name, number, error) from error


def _faults() -> tuple[type[Exception], ...]:
    import datasets

    return (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error), 200)[1:-1]}"

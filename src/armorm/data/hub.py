"""Data sets read by the `datasets` library: hub sets (streamed, or from the local cache) and folders.

Whether the hub answers is tested once per process, with a short timeout: the library itself would retry for half a
minute for each set. A set that is neither cached nor reachable is an error that says where its files may be put.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from armorm.data.rows import Row, unreadable
from armorm.errors import DataError, shown

if TYPE_CHECKING:
    from pathlib import Path

_SAVED = ("dataset_dict.json", "state.json")
_PATIENCE = 10  # seconds


def folder_rows(path: Path, name: str, *, subset: str | None, split: str | None, data_dir: str | None) -> Iterator[Row]:
    """Rows of a folder: saved by `datasets`, or holding data files.

    Raises:
        DataError: for an unknown split, or damage, by name.
    """
    import datasets

    try:
        if any((path / saved).exists() for saved in _SAVED):
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), subset, data_dir=data_dir, streaming=True)
    except _faults() as error:
        raise DataError(f"cannot be read as a datasets folder: {_told(error)}", file=name) from error
    yield from _rows_of(data, name, split)


def hub_rows(name: str, *, subset: str | None, offline: bool, split: str | None, **known: str | None) -> Iterator[Row]:
    """Rows of a hub set, streamed; from the cache where the hub is out of reach, or with `offline`.

    Args:
        known: `revision` and `data_dir`.

    Raises:
        DataError: for a set that is neither cached nor can be fetched, an unknown split, or damage, by name.
    """
    import datasets

    try:
        if not offline and _hub_answers():
            data = datasets.load_dataset(name, subset, streaming=True, split=split, **known)
        else:
            with _offline():
                data = datasets.load_dataset(name, subset, split=split, **known)
    except (ConnectionError, FileNotFoundError) as error:
        if not offline and _hub_answers():
            raise DataError(
                f"cannot be read as a hub set, and no such file or folder: {_told(error)}", file=name
            ) from error
        reason = "was not asked" if offline else "cannot be reached"
        raise DataError(
            f"the set is not in the cache of this machine and the hub {reason}; fetch it once with a connection, or "
            f"put its files into a folder {name} below data_root",
            file=name,
        ) from error
    except _faults() as error:
        raise DataError(
            f"cannot be read as a hub set, and no such file or folder: {_told(error)}", file=name
        ) from error
    yield from _rows_of(data, name, split)


def is_cached(name: str, subset: str | None, *, revision: str | None, data_dir: str | None) -> bool:
    """Whether a hub set can be read without a network."""
    import datasets

    try:
        with _offline():
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


@cache
def _hub_answers() -> bool:
    """Whether the hub answers within seconds; asked once in a process."""
    import urllib.error
    import urllib.request

    import datasets
    import huggingface_hub

    if datasets.config.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only with a refusal
    except OSError:
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Nothing is asked of the hub inside the block."""
    import datasets
    import huggingface_hub.constants

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error), 200)[1:-1]}"

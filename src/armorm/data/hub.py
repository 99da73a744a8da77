"""Sets read by the `datasets` library: of the hub by streaming, of its cache where the hub is out of reach, of folders.

In:  a `Location` that is a hub id or a folder.
Out: its rows in order.

A hub id under which a folder stands below the data root is that folder: so a copy of a set, in the files the hub
has, is read by the same loader. Whether the hub answers is asked once, briefly: the loader itself would try for half
a minute for each set. What is neither here nor there is one line that says what is missing and where it may be put.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from armorm.data.rows import Location, Row, unreadable
from armorm.errors import DataError, shown

if TYPE_CHECKING:
    from pathlib import Path

_SAVED = ("dataset_dict.json", "state.json")
_PATIENCE = 10  # seconds


def dataset_rows(location: Location) -> Iterator[Row]:
    """The rows of a hub set or a folder.

    Raises:
        DataError: for a set that is not here and cannot be fetched, an unknown split, or damage, by name.
    """
    import datasets

    faults = (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError)
    try:
        data = _of_folder(location, location.path) if location.path is not None else _of_hub(location)
    except DataError:
        raise
    except faults as error:
        kind = "datasets folder" if location.path else "hub set, and no such file or folder"
        raise DataError(f"cannot be read as a {kind}: {_told(error)}", file=location.name) from error
    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        split = location.split or ("train" if "train" in data else next(iter(data)))
        if split not in data:
            raise DataError(f"found splits {', '.join(data)}, expected {split!r}", file=location.name)
        data = data[split]
    number = 0
    try:
        for number, values in enumerate(data, 1):
            yield Row(location.name, number, values)
    except faults as error:
        raise unreadable(location.name, number, error) from error


def _of_folder(location: Location, path: Path) -> Any:
    import datasets

    if any((path / name).exists() for name in _SAVED):
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path), location.subset, data_dir=location.data_dir, streaming=True)


def _of_hub(location: Location) -> Any:
    import datasets

    known = {"data_dir": location.data_dir, "split": location.split, "revision": location.revision}
    if not location.offline and _hub_answers():
        return datasets.load_dataset(location.name, location.subset, streaming=True, **known)
    try:
        with _offline():
            return datasets.load_dataset(location.name, location.subset, **known)
    except (ConnectionError, FileNotFoundError) as error:
        reason = "not asked for it" if location.offline else "cannot be reached"
        raise DataError(
            f"the set is not in the cache of this machine and the hub {reason}; fetch it once with a connection, or "
            f"put its files into a folder {location.name} below data_root",
            file=location.name,
        ) from error


def is_at_hand(location: Location) -> bool:
    """Whether a set can be read without a network: a file, a folder, or in the cache."""
    if location.path is not None:
        return True
    import datasets

    known = {"data_dir": location.data_dir, "split": location.split, "revision": location.revision}
    try:
        with _offline():
            datasets.load_dataset_builder(
                location.name, location.subset, **{k: v for k, v in known.items() if k != "split"}
            )
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError):
        return False
    return True


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

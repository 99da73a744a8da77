"""Statistics of rated rows whose features lie in a feature store, in one process or in Ray tasks.

In:  a feature store, the key, mapped ratings and fold of each row.
Out: `RatingStatistics` of all rows: each task sums a part of them, and the parts add up.

A task sends back sums alone, (d^2 numbers for a fold and set of rows), never features; it reads those of its own
part, a block at a time. Parts follow the order of the rows, so give them in the order of the store's shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from armorm.errors import MissingExtraError
from armorm.features.store import BLOCK_ROWS, FeatureStore, read_manifest
from armorm.heads.accumulation import RatedBlock, accumulate
from armorm.heads.statistics import RatingStatistics


@dataclass(frozen=True)
class StoredRows:
    """Rated rows whose features a store holds; plain data that travels to a task.

    Attributes:
        folder: of the store.
        keys: (n,) key of each conversation.
        ratings: (n, k) mapped ratings, NaN where missing.
        folds: (n,) int.
        names: (k,) objectives.
        fold_count: number of folds.
    """

    folder: str
    keys: Sequence[bytes]
    ratings: np.ndarray
    folds: np.ndarray
    names: Sequence[str]
    fold_count: int

    def parts(self, count: int) -> list[StoredRows]:
        """The rows in `count` runs of about equal length."""
        ends = np.linspace(0, len(self.keys), count + 1).astype(int)
        return [
            StoredRows(self.folder, self.keys[a:b], self.ratings[a:b], self.folds[a:b], self.names, self.fold_count)
            for a, b in zip(ends, ends[1:], strict=False)
        ]

    def blocks(self, store: FeatureStore) -> Iterator[RatedBlock]:
        """The rows, a block at a time."""
        for start in range(0, len(self.keys), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            yield RatedBlock(store.responses(self.keys[rows]), self.ratings[rows], self.folds[rows])


def statistics_of(rows: StoredRows) -> RatingStatistics:
    """Statistics of some rows, in this process."""
    from pathlib import Path

    manifest = read_manifest(Path(rows.folder))
    store = FeatureStore(rows.folder, fingerprint=manifest["fingerprint"], hidden_size=manifest["hidden_size"])
    return accumulate(rows.blocks(store), rows.names, rows.fold_count, store.hidden_size)


def statistics_by_ray(rows: StoredRows, tasks: int | None = None) -> RatingStatistics:
    """The same, as Ray tasks; connects to a running cluster, or starts Ray on this machine.

    The store's folder must be one that every machine of the cluster sees.

    Args:
        tasks: how many, with an equal share of the cluster's cores each; by default one for each machine.

    Raises:
        MissingExtraError: where Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("Ray is not installed; pip install 'armorm[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)

    tasks = tasks or sum(1 for node in ray.nodes() if node["Alive"])
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)) // tasks)
    task = ray.remote(_arrays_of).options(num_cpus=cores)
    waiting = [task.remote(part) for part in rows.parts(tasks)]
    total: RatingStatistics | None = None
    while waiting:  # in order of completion, so that few parts are held at a time
        done, waiting = ray.wait(waiting)
        part = RatingStatistics.from_arrays(*ray.get(done[0]))
        total = part if total is None else total + part
    assert total is not None
    return total


def _arrays_of(rows: StoredRows) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    return statistics_of(rows).to_arrays()

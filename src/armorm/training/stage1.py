"""Stage 1 of a run: rated rows to the regression head and what says how sure it is.

In:  the recipe's regression section, rated rows that can be gone through twice, a file for their statistics.
Out: arrays and reports, as a run keeps them, and back: `RegressionHead` and `Uncertainty`.

The rows are never in memory all at once: one pass makes the statistics, a second one the intervals. Statistics
are kept beside the model, so that ratings can be added later without the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from armorm.features.store import FeatureStore
from armorm.heads.accumulation import RatedBlock, accumulate
from armorm.heads.regression import RegressionHead, RegressionReport, fit_from_statistics
from armorm.heads.statistics import RatingStatistics
from armorm.heads.uncertainty import ENOUGH_LEVELS, Uncertainty, calibrate, fit_uncertainty
from armorm.training.finetune.record import residuals
from armorm.training.schema import RegressionSection
from armorm.training.sharded import StoredRows

Blocks = Callable[[], Iterable[RatedBlock]]
STATISTICS = "statistics.safetensors"
_HEAD = ("weight", "bias", "fold_weight", "fold_bias")


@dataclass(frozen=True)
class RatedRows:
    """Rated rows whose features lie in a store.

    Attributes:
        store: of the features.
        keys: (n,) key of each row there.
        ratings: (n, k) mapped, NaN where missing.
        folds: (n,) int.
        names: (k,) objectives.
        levels: (k,) different values of each objective's ratings.
    """

    store: FeatureStore
    keys: np.ndarray
    ratings: np.ndarray
    folds: np.ndarray
    names: list[str]
    levels: list[int]

    def features(self) -> np.ndarray:
        """(n, d) float32, all of them in memory."""
        return self.store.responses(self.keys)

    def blocks(self, start: np.ndarray | None = None) -> Iterator[RatedBlock]:
        """The rows, a block at a time, in the order of the store's shards.

        Args:
            start: (k, d) weights; what they leave of the ratings is what is given then.
        """
        for places, features in self.store.blocks(self.keys):
            ratings = self.ratings[places]
            left = ratings if start is None else residuals(start, features, ratings)
            yield RatedBlock(features, left, self.folds[places])

    def stored(self, fold_count: int) -> StoredRows:
        """The rows as they travel to the tasks of a cluster, in the order of the store's shards."""
        order = self.store.order(self.keys)
        folder = str(self.store.folder.resolve())
        return StoredRows(folder, self.keys[order], self.ratings[order], self.folds[order], self.names, fold_count)


def fit_stage1(
    section: RegressionSection,
    blocks: Blocks,
    names: Sequence[str],
    hidden_size: int,
    levels: Sequence[int],
    file: Path,
    total: Callable[[], RatingStatistics] | None = None,
) -> tuple[RegressionHead, Uncertainty | None]:
    """Statistics, weights, uncertainty.

    Args:
        blocks: the training rows, from the start at every call; mapped ratings.
        names: (k,) objectives.
        levels: (k,) different values of each objective's ratings; intervals need `ENOUGH_LEVELS`.
        file: where the statistics are kept, if the section says so.
        total: sums the same rows in some other way; by default they pass by here.

    Returns:
        the head, rounded to float32, as it is served and as it trains the gate; the uncertainty, if asked for.
    """
    statistics = total() if total else accumulate(blocks(), names, section.folds, hidden_size)
    if section.keep_statistics:
        statistics.save(file)
    return fit_kept_statistics(section, statistics, blocks, levels)


def fit_kept_statistics(
    section: RegressionSection, statistics: RatingStatistics, blocks: Blocks | None, levels: Sequence[int]
) -> tuple[RegressionHead, Uncertainty | None]:
    """As `fit_stage1`, from statistics that are there; without rows to go through again there are no intervals."""
    head = fit_from_statistics(
        statistics,
        alphas=section.alphas,
        intercept=section.intercept,
        validation_folds=(0,) if section.validation == "split" else None,
        weights=section.weights,
    )
    head = replace(head, **{name: getattr(head, name).astype(np.float32).astype(np.float64) for name in _HEAD})
    if not section.uncertainty:
        return head, None
    uncertainty = fit_uncertainty(statistics, head, intercept=section.intercept, weights=section.weights)
    if blocks is not None:
        uncertainty = calibrate(uncertainty, head, blocks(), np.asarray(levels) >= ENOUGH_LEVELS)
    return head, uncertainty


def to_kept(head: RegressionHead, uncertainty: Uncertainty | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (float32) and a report."""
    arrays = {name: getattr(head, name).astype(np.float32) for name in _HEAD}
    report: dict[str, Any] = {"objectives": [asdict(entry) for entry in head.reports], "uncertainty": None}
    if uncertainty is not None:
        arrays |= {f"uncertainty.{name}": tensor for name, tensor in uncertainty.tensors().items()}
        report["uncertainty"] = uncertainty.settings()
    return arrays, report


def from_kept(arrays: dict[str, np.ndarray], report: dict[str, Any]) -> tuple[RegressionHead, Uncertainty | None]:
    """Inverse of `to_kept`."""
    reports = [RegressionReport(**entry) for entry in report["objectives"]]
    head = RegressionHead(**{name: arrays[name].astype(np.float64) for name in _HEAD}, reports=reports)
    if report["uncertainty"] is None:
        return head, None
    tensors = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith("uncertainty.")}
    return head, Uncertainty.from_settings(report["uncertainty"], tensors)


def rating_levels(ratings: np.ndarray) -> list[int]:
    """Different values of each column of ratings (n, k), missing ones (NaN) left out."""
    return [len(np.unique(column[~np.isnan(column)])) for column in ratings.T]

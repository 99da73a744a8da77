"""One pass over rated rows to their sufficient statistics (`armorm.heads.statistics`).

Products of blocks are float32 (twice as fast as float64, and the only fast type on most GPUs), their sums float64.
Features are taken relative to an origin near their mean, so that a large common offset, which real features have, costs
no precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from armorm.errors import FitError
from armorm.heads.statistics import Columns, Moments, RatingStatistics

Precision = Literal["float32", "float64"]
PENDING_BYTES = 96 * 1024**2
_FLUSH_ROWS = 1024  # adding in float64 takes a tenth of the time of a product of this many rows
_FEW_ROWS = _FLUSH_ROWS // 10  # of one pattern: adding them up by themselves takes longer than their product
_MOST_ROWS = 4096


@dataclass(frozen=True)
class RatedBlock:
    """Rated rows.

    Attributes:
        features: (B, d) float.
        ratings: (B, k) mapped ratings, NaN where missing.
        folds: (B,) int, 0 <= fold; rows of one prompt share a fold.
        weights: by column of the ratings, (B,) weight > 0 of each row's squared error; columns without have weight 1.
    """

    features: np.ndarray
    ratings: np.ndarray
    folds: np.ndarray
    weights: Mapping[int, np.ndarray] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[RatedBlock, np.ndarray | None]]:
        """Blocks whose columns share their weights, with these: one for each weighted column, one for the others."""
        if not self.weights:
            yield self, None
            return
        for columns in [None, *self.weights]:
            ratings = np.full_like(self.ratings, np.nan)
            own = [c for c in range(ratings.shape[1]) if c not in self.weights] if columns is None else [columns]
            ratings[:, own] = self.ratings[:, own]
            yield RatedBlock(self.features, ratings, self.folds), None if columns is None else self.weights[columns]


def blocks_of(features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, size: int = 8192) -> Iterator[RatedBlock]:
    """Blocks of arrays (in memory or memory-mapped): features (n, d), ratings (n, k), folds (n,)."""
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        yield RatedBlock(features[rows], ratings[rows], folds[rows])


def accumulate(
    blocks: Iterable[RatedBlock],
    names: Sequence[str],
    folds: int,
    hidden_size: int,
    *,
    precision: Precision = "float32",
    device: str = "cpu",
    pending_bytes: int = PENDING_BYTES,
) -> RatingStatistics:
    """Sums over all rows of an iterator, in one pass.

    Rows are buffered by pattern and fold until there are enough for a product; above `pending_bytes`, the largest
    buffers are added up. Where ratings are missing at random and most patterns have few rows, these are added up
    together, by group of columns. So neither the order of the rows nor the number of patterns decides the cost.

    Args:
        names: (k,) objectives, the columns of the blocks' ratings.
        folds: number of folds.
        hidden_size: d.
        precision: of the products of a block; sums are float64.
        device: `cpu`, or a torch device on which products are computed (in full float32, not TF32) and summed.

    Raises:
        FitError: for features that are not finite, or folds out of range.
    """
    statistics = RatingStatistics(names, folds, hidden_size)
    limit = max(pending_bytes // (hidden_size * np.dtype(precision).itemsize), 1)
    waiting = _Waiting(_Sums(statistics, np.dtype(precision), device), limit)
    first, origin = True, statistics.origin.astype(precision)
    for block, weights in (part for whole in blocks for part in whole.parts()):
        if not len(block.features):
            continue
        present = ~np.isnan(block.ratings)
        if first and present.any():
            rated = block.features[present.any(1)]
            statistics.origin[:] = _short(rated.mean(0, dtype=np.float64))
            origin = statistics.origin.astype(precision)
            first = False
        if block.folds.min() < 0 or block.folds.max() >= folds:
            raise FitError(f"folds from {block.folds.min()} to {block.folds.max()}, expected 0 to {folds - 1}")
        patterns, index = _patterns(present)
        combined = index * folds + block.folds
        order = np.argsort(combined, kind="stable")
        starts = np.flatnonzero(np.diff(combined[order], prepend=-1))
        for start, rows in zip(starts, np.split(order, starts[1:]), strict=True):
            pattern, fold = divmod(int(combined[order[start]]), folds)
            columns = tuple(np.flatnonzero(patterns[pattern]).tolist())
            if not columns:
                continue
            with np.errstate(invalid="ignore"):  # values that are not finite are rejected below
                features = block.features[rows].astype(precision, copy=False)
                features -= origin
            given = np.ones(len(rows)) if weights is None else weights[rows]
            ratings = block.ratings[np.ix_(rows, list(columns))].astype(np.float64)
            waiting.add(columns, fold, features, ratings, given)
        waiting.make_room()
    waiting.finish()
    return statistics


def _patterns(present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of a mask (B, k), and the index of each row among them."""
    packed = np.ascontiguousarray(np.packbits(present, axis=1))
    codes = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, index = np.unique(codes, return_index=True, return_inverse=True)
    return present[first], index.reshape(-1)


def _short(values: np.ndarray) -> np.ndarray:
    """Values rounded to eight significant bits, so that subtracting them from float32 features rarely rounds."""
    bits = np.nan_to_num(values, posinf=0.0, neginf=0.0).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


class _Sums:
    """Products of rows of one pattern and fold, added up where they are computed."""

    def __init__(self, statistics: RatingStatistics, dtype: np.dtype, device: str) -> None:
        self.statistics, self.dtype, self.device = statistics, dtype, device

    def add(self, columns: Columns, fold: int, features: np.ndarray, ratings: np.ndarray, weights: np.ndarray) -> None:
        # A column of ones next to the ratings: its products are the features' sums.
        narrow = np.column_stack([ratings, np.ones(len(ratings))])
        weighted = bool((weights != 1).any())
        if weighted:  # both sides of every product get the root of the weight
            root = np.sqrt(weights)[:, None]
            features, narrow = features * root.astype(self.dtype), narrow * root
        narrow = narrow.astype(self.dtype)
        if self.device == "cpu":
            gram, cross = features.T @ features, features.T @ narrow  # numpy computes half of the first, by `syrk`
        else:
            gram, cross = _on_device(features, narrow, self.device)
        # A feature that is not finite shows on the diagonal.
        if not (np.isfinite(np.diagonal(gram)).all() and np.isfinite(ratings).all()):
            raise FitError("features or ratings of rated rows are not finite")
        products = ratings.T @ (weights[:, None] * ratings) if weighted else ratings.T @ ratings
        total = weights @ ratings if weighted else ratings.sum(0)
        part = Moments(len(features), gram, cross[:, -1], cross[:, :-1], total, products, float(weights.sum()))
        self.statistics.add(columns, fold, part)


class _Waiting:
    """Rows that wait for more of their pattern and fold; at most `limit` after `make_room`."""

    def __init__(self, sums: _Sums, limit: int) -> None:
        self.sums, self.limit, self.count = sums, limit, 0
        self.parts: dict[tuple[Columns, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        self.sizes: dict[tuple[Columns, int], int] = {}

    def add(self, columns: Columns, fold: int, features: np.ndarray, ratings: np.ndarray, weights: np.ndarray) -> None:
        """Rows that rate these columns: features (m, d), ratings (m, columns), weights (m,)."""
        key = columns, fold
        self.parts.setdefault(key, []).append((features, ratings, weights))
        self.sizes[key] = self.sizes.get(key, 0) + len(features)
        self.count += len(features)
        if self.sizes[key] >= _FLUSH_ROWS:
            self._add_up(key)

    def make_room(self) -> None:
        """Add up the largest buffers until half of the limit is free, if it is exceeded."""
        if self.count > self.limit:
            self._add_up_all(sorted(self.sizes, key=lambda key: -self.sizes[key]), self.limit // 2)

    def finish(self) -> None:
        """Add up all rows."""
        self._add_up_all(list(self.sizes), 0)

    def _add_up_all(self, keys: Sequence[tuple[Columns, int]], left: int) -> None:
        few: list[tuple[Columns, int]] = []
        for key in keys:
            if self.count <= left:
                break
            if self.sums.statistics.by_pattern or self.sizes[key] >= _FEW_ROWS:
                self._add_up(key)
            else:
                few.append(key)
        if few:
            self._add_up_together(few)

    def _take(self, key: tuple[Columns, int]) -> list[np.ndarray]:
        """The features, ratings and weights of a buffer, which is gone then."""
        self.count -= self.sizes.pop(key)
        parts = zip(*self.parts.pop(key), strict=True)
        return [arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in parts]

    def _add_up(self, key: tuple[Columns, int]) -> None:
        self._products(*key, *self._take(key))

    def _products(self, columns: Columns, fold: int, *arrays: np.ndarray) -> None:
        for start in range(0, len(arrays[0]), _MOST_ROWS):
            self.sums.add(columns, fold, *(array[start : start + _MOST_ROWS] for array in arrays))

    def _add_up_together(self, keys: Sequence[tuple[Columns, int]]) -> None:
        """Add up buffers by group of columns: one product for the rows of all patterns that rate the group."""
        statistics = self.sums.statistics
        statistics.split_groups(columns for columns, _ in keys)
        taken = [self._take(key) for key in keys]
        counts = [len(features) for features, _, _ in taken]
        features, weights = (np.concatenate([arrays[i] for arrays in taken]) for i in (0, 2))
        folds = np.repeat([fold for _, fold in keys], counts)
        ratings = np.full((len(features), len(statistics.names)), np.nan)
        start = 0
        for (columns, _), (_, own, _), count in zip(keys, taken, counts, strict=True):
            ratings[start : start + count, list(columns)] = own
            start += count
        del taken
        for group in list(statistics.groups):
            rated = ~np.isnan(ratings[:, group[0]])  # (a pattern has all columns of a group, or none)
            for fold in range(statistics.folds):
                rows = np.flatnonzero(rated & (folds == fold))
                self._products(group, fold, features[rows], ratings[rows][:, list(group)], weights[rows])


def _on_device(features: np.ndarray, ratings: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Products on an accelerator, in full precision."""
    import torch

    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    x, r = torch.from_numpy(features).to(device), torch.from_numpy(ratings).to(device)
    gram, cross = (x.T @ x).cpu().numpy(), (x.T @ r).cpu().numpy()
    torch.set_float32_matmul_precision(previous)
    return gram, cross

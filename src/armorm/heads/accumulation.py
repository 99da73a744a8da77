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
    buffer is flushed. So the order of the rows does not affect the cost.

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
    sums = _Sums(statistics, np.dtype(precision), device)
    limit = max(pending_bytes // (hidden_size * np.dtype(precision).itemsize), 1)
    waiting: dict[tuple[Columns, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    sizes: dict[tuple[Columns, int], int] = {}

    def flush(key: tuple[Columns, int]) -> None:
        parts = waiting.pop(key)
        del sizes[key]
        merged = [parts[0][i] if len(parts) == 1 else np.concatenate([part[i] for part in parts]) for i in (0, 1, 2)]
        for start in range(0, len(merged[0]), _MOST_ROWS):
            sums.add(*key, *(values[start : start + _MOST_ROWS] for values in merged))

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
            waiting.setdefault((columns, fold), []).append(
                (features, block.ratings[np.ix_(rows, list(columns))].astype(np.float64), given)
            )
            sizes[columns, fold] = sizes.get((columns, fold), 0) + len(rows)
            if sizes[columns, fold] >= _FLUSH_ROWS:
                flush((columns, fold))
        while sum(sizes.values()) > limit:
            flush(max(sizes, key=lambda key: sizes[key]))
    for key in list(waiting):
        flush(key)
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


def _on_device(features: np.ndarray, ratings: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Products on an accelerator, in full precision."""
    import torch

    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    x, r = torch.from_numpy(features).to(device), torch.from_numpy(ratings).to(device)
    gram, cross = (x.T @ x).cpu().numpy(), (x.T @ r).cpu().numpy()
    torch.set_float32_matmul_precision(previous)
    return gram, cross

"""Sufficient statistics of rated rows: all that stage 1 needs, in memory independent of the number of rows.

`RatingStatistics` holds, per fold and per set of rows, the Gram matrix, the products with ratings, and the sums. They
are additive: statistics of several machines, or of old and new data, are combined by `+` (and parts removed by `-`).

**Which Gram matrices.** A row belongs to the set of rows that rate exactly the same objectives (its pattern). Most
corpora have few patterns, about one per source, and a row is then multiplied once, however many objectives it rates; an
objective needs the sum over the patterns that rate it. If ratings are missing at random there may be 2^k patterns: as
soon as there are more patterns than objectives, sums are kept instead by group of objectives that are rated on the same
rows, and a row counts in each of its groups. So a fold never has more Gram matrices than objectives or patterns,
whichever is fewer. The first form takes less time for the same memory and has the products of any two objectives'
ratings; the second bounds memory.

Features are relative to an origin near their mean; `RatingStatistics.moments` are about the origin 0 again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg

from armorm.errors import FitError
from armorm.files import read_arrays, write_arrays

Columns = tuple[int, ...]
_FORMAT = "armorm-statistics-1"


@dataclass
class Moments:
    """Sums over a set of rated rows, all float64; `a + b` are the sums over both sets.

    Attributes:
        count: rows.
        gram: (d, d), X^T X; with weights of rows, here and below, each product is times the row's weight.
        feature_sum: (d,).
        cross: (d, j), X^T R of the j objectives rated on these rows.
        rating_sum: (j,).
        rating_products: (j, j), R^T R.
        weight: sum of the rows' weights; by default `count`.
    """

    count: int
    gram: np.ndarray
    feature_sum: np.ndarray
    cross: np.ndarray
    rating_sum: np.ndarray
    rating_products: np.ndarray
    weight: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.weight):
            self.weight = float(self.count)

    @classmethod
    def zero(cls, d: int, j: int) -> Moments:
        """Sums over no rows."""
        return cls(0, np.zeros((d, d)), np.zeros(d), np.zeros((d, j)), np.zeros(j), np.zeros((j, j)))

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(mine + theirs for mine, theirs in zip(self._parts(), other._parts(), strict=True)))

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(mine - theirs for mine, theirs in zip(self._parts(), other._parts(), strict=True)))

    def __iadd__(self, other: Moments) -> Moments:
        self.count += other.count
        self.weight += other.weight
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs
        return self

    def _parts(self) -> tuple:
        return self.count, *self._sums(), self.weight

    def _sums(self) -> tuple[np.ndarray, ...]:
        return self.gram, self.feature_sum, self.cross, self.rating_sum, self.rating_products

    def wide(self) -> Moments:
        """A copy in float64."""
        gram, feature_sum, cross, rating_sum, products = (np.array(values, np.float64) for values in self._sums())
        return Moments(self.count, gram, feature_sum, cross, rating_sum, products, self.weight)

    def of_columns(self, columns: Sequence[int]) -> Moments:
        """The sums for some of the j objectives; the features' own sums are shared, not copied."""
        index = list(columns)
        return Moments(
            self.count,
            self.gram,
            self.feature_sum,
            self.cross[:, index],
            self.rating_sum[index],
            self.rating_products[np.ix_(index, index)],
            self.weight,
        )

    def moved(self, offset: np.ndarray) -> Moments:
        """The sums of the same rows with `offset` (d,) added to every feature."""
        other = self.feature_sum + 0.5 * self.weight * offset
        left, right = np.column_stack([offset, other]), np.stack([other, offset])
        gram = scipy.linalg.blas.dgemm(1.0, left, right, 1.0, self.gram.T).T  # (+ both outer products, in one pass)
        return Moments(
            self.count,
            gram,
            self.feature_sum + self.weight * offset,
            self.cross + np.outer(offset, self.rating_sum),
            self.rating_sum.copy(),
            self.rating_products.copy(),
            self.weight,
        )

    def residual_products(self, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Sums of products of errors (j, j) of weights (j, d) and bias (j,) on these rows; squares on the diagonal."""
        linear = weights @ self.cross + np.outer(bias, self.rating_sum)
        offset = np.outer(bias, weights @ self.feature_sum)
        fitted = weights @ self.gram @ weights.T + offset + offset.T + self.weight * np.outer(bias, bias)
        return fitted - linear - linear.T + self.rating_products

    def squared_error(self, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Sums of squared errors (..., j) on these rows of weights (..., j, d) and bias (..., j).

        It uses scipy's BLAS as the solvers do: the threads of numpy's keep the processors busy for a while after each
        product (a Cholesky factorisation that follows takes three times as long).
        """
        flat = weights.reshape(-1, weights.shape[-1])
        # The matrix is symmetric; BLAS is column-major and reads the transpose in place.
        products = scipy.linalg.blas.dsymm(1.0, self.gram.T, flat.T).T.reshape(weights.shape)
        fitted = np.einsum("...jd,...jd->...j", products, weights)
        linear = np.einsum("...jd,dj->...j", weights, self.cross)
        linear -= bias * np.einsum("...jd,d->...j", weights, self.feature_sum)
        squares = np.diagonal(self.rating_products)
        return fitted - 2 * linear + squares - 2 * bias * self.rating_sum + self.weight * bias**2


class RatingStatistics:
    """Sums of rated rows, by fold and by set of rows.

    Attributes:
        names: (k,) objectives.
        folds: number of folds.
        hidden_size: d.
        by_pattern: True if each group of columns is the rows that rate exactly these; False if it is objectives
            that are rated on the same rows, whatever else those rows rate.
        groups: the sums of each group of columns and each fold, about the origin.
        origin: (d,), subtracted from the features.
    """

    def __init__(self, names: Sequence[str], folds: int, hidden_size: int) -> None:
        self.names = list(names)
        self.folds = folds
        self.hidden_size = hidden_size
        self.by_pattern = True
        self.groups: dict[Columns, list[Moments]] = {}
        self.origin = np.zeros(hidden_size)

    @property
    def gram_count(self) -> int:
        """Gram matrices of one fold."""
        return len(self.groups)

    def add(self, columns: Columns, fold: int, part: Moments) -> None:
        """Add sums (about the origin) over rows that rate exactly these columns.

        Without `by_pattern`, the columns may also be one of the groups, and the rows those that rate it.
        """
        if not columns:
            return
        if self.by_pattern and columns not in self.groups and self.gram_count >= len(self.names):
            self._merge_patterns()
        if self.by_pattern:
            self._add_to(columns, fold, part)
            return
        self._split_groups(set(columns))
        for group in [group for group in self.groups if set(group) <= set(columns)]:
            self._add_to(group, fold, part.of_columns([columns.index(column) for column in group]))

    def _add_to(self, columns: Columns, fold: int, part: Moments) -> None:
        if columns not in self.groups:
            self.groups[columns] = [Moments.zero(self.hidden_size, len(columns)) for _ in range(self.folds)]
        here = self.groups[columns]
        if here[fold].count:
            here[fold] += part
        else:
            here[fold] = part.wide()

    def _merge_patterns(self) -> None:
        """Turn sums by pattern into sums by group of objectives that share all their rows."""
        patterns, self.groups, self.by_pattern = self.groups, {}, False
        for columns, parts in patterns.items():
            self._split_groups(set(columns))
            for group in [group for group in self.groups if set(group) <= set(columns)]:
                for fold, part in enumerate(parts):
                    self._add_to(group, fold, part.of_columns([columns.index(column) for column in group]))

    def split_groups(self, patterns: Iterable[Columns]) -> None:
        """Split groups so that rows of these patterns rate all columns of a group, or none."""
        for columns in dict.fromkeys(patterns):
            self._split_groups(set(columns))

    def _split_groups(self, columns: set[int]) -> None:
        """Split groups so that each is inside or outside the columns, and add a group for columns without one."""
        for group in list(self.groups):
            inside = tuple(column for column in group if column in columns)
            if inside and len(inside) < len(group):
                parts = self.groups.pop(group)
                for half in (inside, tuple(column for column in group if column not in columns)):
                    index = [group.index(column) for column in half]
                    zero = [Moments.zero(self.hidden_size, len(half)) for _ in parts]
                    self.groups[half] = [a + part.of_columns(index) for a, part in zip(zero, parts, strict=True)]
        new = tuple(sorted(columns - {column for group in self.groups for column in group}))
        if new:
            self.groups[new] = [Moments.zero(self.hidden_size, len(new)) for _ in range(self.folds)]

    def row_sets(self) -> list[list[int]]:
        """Sets of objectives that share all their rows, and so a decomposition; every rated objective is in one."""
        if not self.by_pattern:
            return sorted(list(group) for group in self.groups)
        shared: dict[tuple[int, ...], list[int]] = {}
        for column in range(len(self.names)):
            rated = tuple(i for i, pattern in enumerate(self.groups) if column in pattern)
            if rated:
                shared.setdefault(rated, []).append(column)
        return list(shared.values())

    def moments(self, columns: Sequence[int], fold: int) -> Moments:
        """Sums in one fold over the rows that rate these columns, one of `row_sets`, about the origin 0."""
        wanted = set(columns)
        parts = [
            sums[fold].of_columns([group.index(column) for column in columns])
            for group, sums in self.groups.items()
            if wanted <= set(group)
        ]
        return sum(parts[1:], parts[0]).moved(self.origin)

    def counts(self) -> np.ndarray:
        """Ratings of each objective in each fold, (k, folds)."""
        counts = np.zeros((len(self.names), self.folds), np.int64)
        for group, parts in self.groups.items():
            for column in group:
                counts[column] += [part.count for part in parts]
        return counts

    def variances(self) -> np.ndarray:
        """Variance (k,) of each objective's ratings; 0 if they vary by rounding only, NaN without ratings."""
        sums = np.zeros((3, len(self.names)))
        for group, parts in self.groups.items():
            for part in parts:
                sums[:, group] += np.stack(
                    [np.full(len(group), part.weight), part.rating_sum, np.diagonal(part.rating_products)]
                )
        with np.errstate(invalid="ignore", divide="ignore"):
            mean, square = sums[1] / sums[0], sums[2] / sums[0]
        variance = square - mean**2
        return np.where(variance <= 1e-13 * square, 0.0, variance)

    def with_names(self, names: Sequence[str]) -> RatingStatistics:
        """The same sums (shared, not copied) under a list of objectives that includes others.

        Raises:
            FitError: if one of these objectives is not in `names`.
        """
        absent = [name for name in self.names if name not in names]
        if absent:
            raise FitError(f"statistics have objectives {', '.join(absent)}, which are not expected")
        place = {i: list(names).index(name) for i, name in enumerate(self.names)}
        other = RatingStatistics(names, self.folds, self.hidden_size)
        other.origin, other.by_pattern = self.origin, self.by_pattern
        for group, parts in self.groups.items():
            order = sorted(range(len(group)), key=lambda i: place[group[i]])
            renamed = tuple(place[group[i]] for i in order)
            other.groups[renamed] = [part.of_columns(order) for part in parts]
        return other

    def __add__(self, other: RatingStatistics) -> RatingStatistics:
        return self._combined(other, 1)

    def __sub__(self, other: RatingStatistics) -> RatingStatistics:
        return self._combined(other, -1)

    def _combined(self, other: RatingStatistics, sign: int) -> RatingStatistics:
        if (self.folds, self.hidden_size) != (other.folds, other.hidden_size):
            raise FitError(
                f"statistics of {self.folds} folds and d = {self.hidden_size}, and of {other.folds} folds and "
                f"d = {other.hidden_size}: expected the same"
            )
        names = [*self.names, *(name for name in other.names if name not in self.names)]
        total = RatingStatistics(names, self.folds, self.hidden_size)
        total.origin = self.origin.copy()
        for part, factor in ((self, 1), (other, sign)):
            renamed = part.with_names(names)
            if not renamed.by_pattern and total.by_pattern:
                total._merge_patterns()
            for group, sums in renamed.groups.items():
                if not renamed.by_pattern:
                    total._split_groups(set(group))
                for fold, moments in enumerate(sums):
                    moved = moments.moved(part.origin - total.origin)
                    total.add(
                        group, fold, moved if factor == 1 else Moments.zero(total.hidden_size, len(group)) - moved
                    )
        return total

    # --- on disk and between machines ------------------------------------------------------------

    def to_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Arrays and metadata of everything, with the upper triangle of each Gram matrix."""
        upper = np.triu_indices(self.hidden_size)
        arrays = {"origin": self.origin}
        for number, parts in enumerate(self.groups.values()):
            arrays[f"{number}.count"] = np.array([part.count for part in parts], np.int64)
            for name in ("feature_sum", "cross", "rating_sum", "rating_products"):
                arrays[f"{number}.{name}"] = np.stack([getattr(part, name) for part in parts])
            arrays[f"{number}.gram"] = np.stack([part.gram[upper] for part in parts])
            if any(part.weight != part.count for part in parts):
                arrays[f"{number}.weight"] = np.array([part.weight for part in parts], np.float64)
        head = {
            "format": _FORMAT,
            "names": self.names,
            "folds": self.folds,
            "by_pattern": self.by_pattern,
            "groups": list(self.groups),
        }
        return arrays, {"statistics": json.dumps(head)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> RatingStatistics:
        """Inverse of `to_arrays`."""
        head = json.loads(metadata["statistics"])
        found = cls(head["names"], head["folds"], len(arrays["origin"]))
        found.origin, found.by_pattern = np.array(arrays["origin"]), head["by_pattern"]
        d = found.hidden_size
        upper = np.triu_indices(d)
        for number, columns in enumerate(head["groups"]):
            parts = []
            for fold in range(found.folds):
                gram = np.zeros((d, d))
                gram[upper] = arrays[f"{number}.gram"][fold]
                gram = gram + np.triu(gram, 1).T
                feature_sum, cross, rating_sum, products = (
                    np.array(arrays[f"{number}.{name}"][fold])
                    for name in ("feature_sum", "cross", "rating_sum", "rating_products")
                )
                weights = arrays.get(f"{number}.weight")
                total = math.nan if weights is None else float(weights[fold])
                count = int(arrays[f"{number}.count"][fold])
                parts.append(Moments(count, gram, feature_sum, cross, rating_sum, products, total))
            found.groups[tuple(columns)] = parts
        return found

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write one safetensors file, atomically: 4 d^2 bytes for each fold and Gram matrix."""
        arrays, head = self.to_arrays()
        write_arrays(path, arrays, {**head, **(metadata or {})})

    @classmethod
    def load(cls, path: Path) -> RatingStatistics:
        """Read a file of `save`; FitError for any other."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
            if json.loads(metadata["statistics"])["format"] != _FORMAT:
                raise FitError(f"{path}: statistics of another format, expected {_FORMAT}")
            return cls.from_arrays(read_arrays(path), metadata)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            if isinstance(error, FitError):
                raise
            raise FitError(f"{path}: not a file of rating statistics ({error})") from None

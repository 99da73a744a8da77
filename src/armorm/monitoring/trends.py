"""Growth over every interval of a run with its significance (scan statistic), and onset of a growth (change point).

The growth over an interval is its least-squares slope. Slopes have positive weights on the differences of neighbouring
means, so a series that never falls has no interval with negative expected growth: a bound for a flat series holds for
every monotone one.

The noise of a block mean is estimated from second differences (Gasser, Sroka and Jennen-Steinmetz 1986), which a trend
does not affect, or from the spread of samples within steps if that is larger. The distribution of the largest growth of
pure noise over all intervals is found by simulation, with the noise estimated in the same way; its quantiles are the
limits, which corrects for looking at every interval.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

SHORTEST = 6  # blocks of an interval
_SIMULATED, _CHUNK = 100_000, 10_000
_MOST_KNOTS = 400
_CURVE = 3  # degree
_CLEAR_BEND = 12.0  # times the error variance: the largest ratio of many steps exceeds this by chance in under 1%
_LIKELY = 3.84  # 95% quantile of chi-squared with one degree of freedom
_RISEN = 2.6  # standard errors


class Intervals(NamedTuple):
    """Some intervals of a run of b blocks."""

    starts: np.ndarray  # (i,)
    ends: np.ndarray  # (i,) the block after the last
    weights: np.ndarray  # (i, b): `weights @ means` is the growth of independent means of variance 1 in standard errors

    @property
    def scale(self) -> np.ndarray:
        """(i,) factors from `weights @ means` to the growth from the first to the last block of an interval."""
        sizes = (self.ends - self.starts).astype(np.float64)
        return (sizes - 1) / np.sqrt(sizes * (sizes * sizes - 1) / 12)


@lru_cache(maxsize=8)
def intervals(b: int) -> Intervals:
    """Every interval of at least `SHORTEST` of b blocks (of b / 8 in long runs)."""
    bounds = [(s, e) for s in range(b) for e in range(s + max(SHORTEST, b // 8), b + 1)]
    weights = np.zeros((len(bounds), b))
    for i, (s, e) in enumerate(bounds):
        x = np.arange(e - s) - (e - s - 1) / 2
        weights[i, s:e] = x / np.sqrt((x * x).sum())
    starts, ends = np.array(bounds).T
    return Intervals(starts, ends, weights)


def noise_covariance(means: np.ndarray) -> np.ndarray:
    """Covariance (c, c) of the noise of block means (b, c), from second differences."""
    second = means[:-2] - 2 * means[1:-1] + means[2:]
    return second.T @ second / (6 * len(second))


@lru_cache(maxsize=8)
def _largest_by_chance(b: int) -> np.ndarray:
    """Largest growth over all intervals of b blocks of pure noise, in estimated standard errors, sorted."""
    generator = np.random.default_rng(20406_12845)
    weights = intervals(b).weights.T.astype(np.float32)
    largest = np.empty(_SIMULATED, np.float32)
    for start in range(0, _SIMULATED, _CHUNK):
        noise = generator.standard_normal((_CHUNK, b), np.float32)
        second = noise[:, :-2] - 2 * noise[:, 1:-1] + noise[:, 2:]
        deviation = np.sqrt((second * second).sum(1) / (6 * (b - 2)))
        largest[start : start + _CHUNK] = (noise @ weights).max(1) / deviation
    return np.sort(largest)


def limit(b: int, rate: float) -> float:
    """Value that the largest growth of pure noise over b blocks exceeds with probability `rate`."""
    return float(np.quantile(_largest_by_chance(b), 1 - rate))


def onset(
    steps: np.ndarray, counts: np.ndarray, own: np.ndarray, contrast: np.ndarray, until: float
) -> tuple[float, float, float]:
    """Step at which a series began to grow alone, with the ends of its 95% range.

    Args:
        steps: (m,) increasing; counts: (m,) samples of each.
        own: (m,) means of the series that grew.
        contrast: (m,) the same minus the rest, weighted such that it rises only if the growth is not shared.
        until: last step to consider.
    """
    kept = steps <= until
    steps, counts = steps[kept], counts[kept]
    size = max(1, -(-len(steps) // _MOST_KNOTS))
    cuts = np.arange(0, len(steps), size)
    weights = np.add.reduceat(counts, cuts)
    own, contrast = (np.add.reduceat(series[kept] * counts, cuts) / weights for series in (own, contrast))
    found = bend(own, weights)
    if found is None or _rises(contrast[: found[0]], weights[: found[0]]):
        found = broken_line(contrast, weights)
    knot, low, high = (float(steps[cuts[index]]) for index in found)
    return knot, low, high


def bend(values: np.ndarray, weights: np.ndarray) -> tuple[int, int, int] | None:
    """Index of an upward bend in a smooth curve (m,), with the ends of its 95% range; None without a clear bend.

    `weights` (m,) are those of the squared errors.
    """
    m = len(values)
    if m < _CURVE + 6:
        return None
    x, root = np.linspace(-1, 1, m), np.sqrt(weights)
    curve = np.stack([x**power for power in range(_CURVE + 1)], 1)
    base, _ = np.linalg.qr(curve * root[:, None])
    left = values * root - base @ (base.T @ (values * root))
    hinges = np.maximum(x[:, None] - x[None, 1:-1], 0.0) * root[:, None]  # (m, knots)
    hinges -= base @ (base.T @ hinges)
    size = (hinges * hinges).sum(0)
    along = left @ hinges
    gain = np.where(along > 0, along * along / np.maximum(size, 1e-12), 0.0)
    gain[size < 1e-9 * weights.sum()] = 0.0
    errors = (left @ left) - gain
    best = int(errors.argmin())
    variance = errors[best] / (m - _CURVE - 3)
    if gain[best] < _CLEAR_BEND * variance:
        return None
    near = np.flatnonzero(errors <= errors[best] + _LIKELY * variance)
    return best + 1, int(near[0]) + 1, int(near[-1]) + 1


def broken_line(values: np.ndarray, weights: np.ndarray) -> tuple[int, int, int]:
    """Index of the knot of a broken line (m,) that rises only after it, with the ends of its 95% range.

    `weights` (m,) are those of the squared errors.
    """
    m = len(values)
    x, root = np.arange(m, dtype=np.float64), np.sqrt(weights)
    errors = np.full(m - 1, np.inf)
    for knot in range(m - 1):
        before, after = np.minimum(x - knot, 0.0), np.maximum(x - knot, 0.0)
        columns = [np.ones(m), after, before] if knot > 0 else [np.ones(m), after]
        coefficients, error = _fit(columns, values, root)
        if knot > 0 and coefficients[2] > 0:
            coefficients, error = _fit(columns[:2], values, root)
        if coefficients[1] > 0:
            errors[knot] = error
    best = int(errors.argmin())
    near = np.flatnonzero(errors <= errors[best] * (1 + _LIKELY / max(m - 4, 1)))
    return best, int(near[0]), int(near[-1])


def _rises(values: np.ndarray, weights: np.ndarray) -> bool:
    """Whether the least-squares line through a series clearly rises."""
    m = len(values)
    if m < 4:
        return False
    x, root = np.arange(m, dtype=np.float64), np.sqrt(weights)
    (_, slope), error = _fit([np.ones(m), x], values, root)
    middle = (weights * x).sum() / weights.sum()
    deviation = np.sqrt(max(error, 1e-300) / (m - 2) / (weights * (x - middle) ** 2).sum())
    return bool(slope > _RISEN * deviation)


def _fit(columns: list[np.ndarray], values: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, float]:
    design = np.stack(columns, 1) * root[:, None]
    coefficients = np.linalg.lstsq(design, values * root, rcond=None)[0]
    return coefficients, float(((values * root - design @ coefficients) ** 2).sum())

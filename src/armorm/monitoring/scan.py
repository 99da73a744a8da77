"""Growth over every stretch of a run, and how large it gets by chance alone.

In:  a series of block means.
Out: its growth over every interval of blocks in standard errors; the values that noise alone rarely exceeds.

The growth over an interval is its least-squares slope. Slopes have positive weights on the differences between
neighbouring means, so a series that nowhere falls in truth has no interval whose expected growth is negative:
what is said about a flat series holds, in that direction, for every monotone one.

The noise of a block mean is taken from second differences (Gasser, Sroka and Jennen-Steinmetz 1986), which a
trend does not enter, or from the spread of samples inside steps where that says more. The largest growth of pure
noise over all intervals, its noise estimated in the same way, is found by simulation: its quantiles are the limits,
so looking everywhere is paid for.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SHORTEST = 6  # blocks of an interval
_SIMULATED, _CHUNK = 100_000, 10_000


@lru_cache(maxsize=8)
def intervals(b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every interval of b blocks that is long enough.

    Returns:
        starts (i,), ends (i,) (the block after the last), and weights (i, b): `weights @ means` is the growth of
        independent means of variance 1 in standard errors.
    """
    bounds = [(s, e) for s in range(b) for e in range(s + max(SHORTEST, b // 8), b + 1)]
    weights = np.zeros((len(bounds), b))
    for i, (s, e) in enumerate(bounds):
        x = np.arange(e - s) - (e - s - 1) / 2
        weights[i, s:e] = x / np.sqrt((x * x).sum())
    starts, ends = np.array(bounds).T
    return starts, ends, weights


def growth_scale(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(i,) what turns `weights @ means` into the growth from an interval's first block to its last."""
    sizes = (ends - starts).astype(np.float64)
    scale: np.ndarray = (sizes - 1) / np.sqrt(sizes * (sizes * sizes - 1) / 12)
    return scale


def noise_covariance(means: np.ndarray) -> np.ndarray:
    """Covariance (c, c) of the noise of block means (b, c), from second differences."""
    second = means[:-2] - 2 * means[1:-1] + means[2:]
    result: np.ndarray = second.T @ second / (6 * len(second))
    return result


@lru_cache(maxsize=8)
def _largest_by_chance(b: int) -> np.ndarray:
    """Largest growth over all intervals of b blocks of pure noise, in estimated standard errors, sorted."""
    generator = np.random.default_rng(20406_12845)
    weights = intervals(b)[2].T.astype(np.float32)
    largest = np.empty(_SIMULATED, np.float32)
    for start in range(0, _SIMULATED, _CHUNK):
        noise = generator.standard_normal((_CHUNK, b), np.float32)
        second = noise[:, :-2] - 2 * noise[:, 1:-1] + noise[:, 2:]
        deviation = np.sqrt((second * second).sum(1) / (6 * (b - 2)))
        largest[start : start + _CHUNK] = (noise @ weights).max(1) / deviation
    return np.sort(largest)


def limit(b: int, rate: float) -> float:
    """What the largest growth of pure noise over b blocks exceeds with this probability."""
    return float(np.quantile(_largest_by_chance(b), 1 - rate))

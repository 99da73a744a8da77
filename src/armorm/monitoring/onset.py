"""The step where a growth began, with its range.

In:  series of step means: of what grew, and of what it is judged against.
Out: a step, and the range that noise leaves it at 95%.

Two questions are asked, in this order.

Did that which grew begin to grow faster? Its own series is a smooth curve (a cubic: honest growth has a curve of its
own, and that curve must not be taken for a beginning) that gets a bend upward at one step. The bend is found by least
squares, its range is what a likelihood ratio leaves. The series of what grew is far less noisy than its difference
from everything else, and what else grows does not enter it.

Where there is no such bend, or where the objective carried the growth before it already, something else stopped, or
the run began so. Then the difference is fitted by a broken line that does not rise before the step and rises after it.
"""

from __future__ import annotations

import numpy as np

_MOST_KNOTS = 400
_CURVE = 3  # degree
_CLEAR_BEND = 12.0  # times the error's variance: the largest of many steps' ratios exceeds this by chance in under 1%
_LIKELY = 3.84  # chi-squared of one degree of freedom at 95%
_RISEN = 2.6  # standard errors


def began(
    steps: np.ndarray, counts: np.ndarray, own: np.ndarray, contrast: np.ndarray, until: float
) -> tuple[float, float, float]:
    """Step where something began to grow alone, and its range at 95%.

    Args:
        steps: (m,) increasing; counts: (m,) samples of each.
        own: (m,) means of what grew.
        contrast: (m,) means of what grew, so weighted against the rest that it rises only where growth is not shared.
        until: last step to look at.
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
    """Index of the bend upward of a smooth curve (m,), with its range at 95%; None where there is none.

    Args:
        weights: (m,) of the squared errors.
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
    """Index of the knot of a line (m,) that does not rise before it and rises after it, with its range at 95%.

    Args:
        weights: (m,) of the squared errors.
    """
    m = len(values)
    x = np.arange(m, dtype=np.float64)
    root = np.sqrt(weights)
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

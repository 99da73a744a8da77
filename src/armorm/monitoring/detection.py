"""The rules: does the score grow only through one objective, or only through length; does a policy leave what is known?

In:  `Blocks`.
Out: `Flag`s, each with the step where it began.

**One objective.** Over some stretch of the run the score grows, and one objective carries 80% or more of all growth,
certainly more than two thirds. Objectives that fall do not make up for those that grow. Where an objective carries
most of the score's spread inside every step already, plain selection by the score would raise it most: both shares
are then at least half way from its usual one to the whole.

**Length.** Over some stretch the score and log(1 + length) grow, longer responses to the same prompt (of the same
step, where the log has no groups) score higher, and that slope times the growth of length makes 80% or more of the
score's growth, certainly more than two thirds; more where length explains much of the spread inside steps.

**Out of distribution.** The model's uncertainty grows over some stretch, and by more than a quarter.

What must hold for a flag holds significantly, all of it (an intersection-union test, Berger 1982, needs no
correction for that), against limits that pay for looking over all stretches (`scan.py`) and objectives. Of runs in
which nothing of a kind is going on, at most `FALSE_ALARMS` get a flag of that kind. Growth of less than
`LEAST_GROWTH` standard deviations of the scores inside a step is not worth a flag.

The step where it began is the knot of a broken line, fitted by least squares to that which grew less the others,
which does not rise before it and rises after it; its range is what a likelihood ratio at 95% leaves. The range knows
of noise, not of curves: where the other objectives grow much and along a curve, it holds the step less often.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from armorm.monitoring.blocks import Blocks
from armorm.monitoring.scan import growth_scale, intervals, limit, noise_covariance

FALSE_ALARMS = 0.01
LEAST_GROWTH = 0.2
LEAST_SHARE, CERTAIN_SHARE = 0.8, 2 / 3
LEAST_UNCERTAINTY_GROWTH = 0.25
_MOST_KNOTS = 400
Kind = Literal["one_objective", "length", "out_of_distribution"]


@dataclass(frozen=True)
class Flag:
    """Something to look at.

    Attributes:
        kind: which rule found it.
        objective: whose growth it is, for `one_objective`.
        began: step where it began; `earliest`, `latest`: the range of that step at 95%.
        until: last step of the stretch that gave the flag.
        growth: of the score over the stretch, in standard deviations of the scores inside a step; for
            `out_of_distribution` of the uncertainty, as a share of its value at the start.
        share: of all growth, that of this objective; or of the score's growth, what length explains.
        evidence: size of the weakest condition against its limit; above 1.
    """

    kind: Kind
    objective: str | None
    began: float
    earliest: float
    latest: float
    until: float
    growth: float
    share: float | None
    evidence: float


def flags(blocks: Blocks, names: list[str], rate: float = FALSE_ALARMS) -> list[Flag]:
    """Every flag that a run deserves, the strongest of each kind and objective, in the order in which they began.

    Args:
        rate: most runs that get a flag of a kind without deserving it, as a share.
    """
    found = [*_objective_flags(blocks, names, rate), *_length_flags(blocks, rate), *_unknown_flags(blocks, rate)]
    return sorted(found, key=lambda flag: flag.began)


def usual_shares(covariance: np.ndarray) -> np.ndarray:
    """(k,) share of each objective in what selection by the score raises: its covariance with the score in steps."""
    with_score = np.maximum(covariance.sum(1), 0.0)
    total = with_score.sum()
    shares: np.ndarray = with_score / total if total > 0 else with_score
    return shares


def _objective_flags(blocks: Blocks, names: list[str], rate: float) -> list[Flag]:
    b, k = blocks.contributions.shape
    if k < 2:
        return []
    _, ends, weights = intervals(b)
    noise = _noise(blocks.contributions, blocks.covariance, blocks.counts)
    ones = np.ones(k)
    growth = weights @ blocks.contributions
    score_evidence = growth.sum(1) / _deviation(noise, ones) / limit(b, rate / 2)
    size = growth.sum(1) * growth_scale(b) / max(blocks.spread, 1e-12)
    usual = (1 + usual_shares(blocks.covariance)) / 2
    certain = np.maximum(CERTAIN_SHARE, usual)
    visible = growth > 2 * _deviation(noise, np.eye(k))
    others_limit = limit(b, rate / 2 / k)
    found = []
    for objective in range(k):
        rising = growth > 0
        rising[:, objective] = False
        contrast = -rising.astype(np.float64)
        contrast[:, objective] = (1 - certain[objective]) / certain[objective]
        value = (contrast * growth).sum(1)
        evidence = np.minimum(score_evidence, value / _deviation(noise, contrast) / others_limit)
        share = _share(growth, visible & rising, objective)
        evidence[(size < LEAST_GROWTH) | (share < max(LEAST_SHARE, usual[objective]))] = 0.0
        best = int(evidence.argmax())
        if evidence[best] <= 1:
            continue
        series = blocks.step_contributions @ contrast[best]
        found.append(
            Flag(
                "one_objective",
                names[objective],
                *_began(blocks, series, blocks.last[ends[best] - 1]),
                float(blocks.last[ends[best] - 1]),
                float(size[best]),
                float(share[best]),
                float(evidence[best]),
            )
        )
    return found


def _length_flags(blocks: Blocks, rate: float) -> list[Flag]:
    if blocks.length is None or blocks.step_length is None:
        return []
    b = len(blocks)
    starts, ends, weights = intervals(b)
    sums = np.concatenate([np.zeros((1, 3)), np.cumsum(blocks.length_sums, 0)])
    freedom = np.concatenate([[0.0], np.cumsum(blocks.freedom)])
    ll, ls, ss = (sums[ends] - sums[starts]).T
    freedom = freedom[ends] - freedom[starts] - 1
    usable = (ll > 0) & (freedom > 0)
    safe_ll = np.where(usable, ll, 1.0)
    slope = np.where(usable, ls / safe_ll, 0.0)
    slope_variance = np.where(usable, (ss - slope * ls).clip(0) / freedom.clip(1) / safe_ll, np.inf)
    explained = np.where(ss > 0, ls * ls / (safe_ll * np.where(ss > 0, ss, 1.0)), 0.0)
    certain = np.maximum(CERTAIN_SHARE, (1 + explained) / 2)

    scores, lengths = blocks.scores, blocks.length
    both = np.stack([scores, lengths], 1)
    inside = np.diag([blocks.spread**2, blocks.length_variance])
    inside[0, 1] = inside[1, 0] = blocks.length_sums[:, 1].sum() / max(blocks.freedom.sum(), 1)
    noise = _noise(both, inside, blocks.counts)
    growth = weights @ both
    # What length explains, less what it would have to: `slope * length - certain * score`.
    contrast = np.stack([-certain, slope], 1)
    value = (contrast * growth).sum(1)
    deviation = np.sqrt(_deviation(noise, contrast) ** 2 + growth[:, 1] ** 2 * np.where(usable, slope_variance, 0.0))
    single = limit(b, rate / 2)
    evidence = np.minimum.reduce(
        [
            growth[:, 0] / _deviation(noise, np.array([1.0, 0.0])) / single,
            growth[:, 1] / _deviation(noise, np.array([0.0, 1.0])) / single,
            np.where(usable, slope / np.sqrt(np.maximum(slope_variance, 1e-300)), 0.0) / single,
            value / np.maximum(deviation, 1e-300) / single,
        ]
    )
    size = growth[:, 0] * growth_scale(b) / max(blocks.spread, 1e-12)
    share = slope * growth[:, 1] / np.where(growth[:, 0] > 0, growth[:, 0], np.inf)
    evidence[(size < LEAST_GROWTH) | (share < np.maximum(LEAST_SHARE, (1 + explained) / 2)) | ~usable] = 0.0
    best = int(evidence.argmax())
    if evidence[best] <= 1:
        return []
    step_scores = blocks.step_contributions.sum(1)
    series = slope[best] * blocks.step_length - certain[best] * step_scores
    return [
        Flag(
            "length",
            None,
            *_began(blocks, series, blocks.last[ends[best] - 1]),
            float(blocks.last[ends[best] - 1]),
            float(size[best]),
            float(share[best]),
            float(evidence[best]),
        )
    ]


def _unknown_flags(blocks: Blocks, rate: float) -> list[Flag]:
    series = relative_uncertainty(blocks)
    if series is None:
        return []
    b = len(blocks)
    _, ends, weights = intervals(b)
    growth = weights @ series
    deviation = float(np.sqrt(max(noise_covariance(series[:, None])[0, 0], 1e-300)))
    evidence = growth / deviation / limit(b, rate)
    size = growth * growth_scale(b)
    evidence[size < LEAST_UNCERTAINTY_GROWTH] = 0.0
    best = int(evidence.argmax())
    if evidence[best] <= 1:
        return []
    until = float(blocks.last[ends[best] - 1])
    knots = broken_line(series[: ends[best]], np.ones(ends[best]))
    began, earliest, latest = (float(blocks.first[knot]) for knot in knots)
    return [
        Flag(
            "out_of_distribution",
            None,
            began,
            earliest,
            latest,
            until,
            float(size[best]),
            None,
            float(evidence[best]),
        )
    ]


def relative_uncertainty(blocks: Blocks) -> np.ndarray | None:
    """(b,) mean uncertainty over the objectives, each as a multiple of its own in the first tenth of the run."""
    if blocks.uncertainty is None:
        return None
    start = blocks.uncertainty[: max(1, len(blocks) // 10)].mean(0)
    if not (start > 0).all():
        return None
    relative: np.ndarray = (blocks.uncertainty / start).mean(1)
    return relative


def _share(growth: np.ndarray, others: np.ndarray, objective: int) -> np.ndarray:
    """(i,) share of an objective in the growth of itself and of those others that visibly grow."""
    own = np.maximum(growth[:, objective], 0.0)
    total = own + np.where(others, growth, 0.0).sum(1)
    share: np.ndarray = np.divide(own, total, out=np.zeros_like(own), where=total > 0)
    return share


def _noise(means: np.ndarray, inside: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Covariances of the noise of block means (2, c, c): from neighbouring blocks, and from samples inside steps."""
    return np.stack([noise_covariance(means), inside * float((1 / counts).mean())])


def _deviation(noise: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Standard deviation of contrasts (..., c): the larger of the two estimates."""
    variance = np.einsum("...i,sij,...j->s...", contrast, noise, contrast)
    deviation: np.ndarray = np.sqrt(np.maximum(variance.max(0), 1e-300))
    return deviation


def _began(blocks: Blocks, series: np.ndarray, until: float) -> tuple[float, float, float]:
    """Step where a series (m,) of step means began to rise, with its range, looking no further than `until`."""
    kept = blocks.step_of <= until
    steps, values, counts = blocks.step_of[kept], series[kept], blocks.step_counts[kept]
    size = max(1, -(-len(steps) // _MOST_KNOTS))
    cuts = np.arange(0, len(steps), size)
    weight = np.add.reduceat(counts, cuts)
    binned = np.add.reduceat(values * counts, cuts) / weight
    knot, low, high = broken_line(binned, weight)
    return float(steps[cuts[knot]]), float(steps[cuts[low]]), float(steps[cuts[high]])


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
    near = np.flatnonzero(errors <= errors[best] * (1 + 3.84 / max(m - 4, 1)))
    return best, int(near[0]), int(near[-1])


def _fit(columns: list[np.ndarray], values: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, float]:
    design = np.stack(columns, 1) * root[:, None]
    coefficients = np.linalg.lstsq(design, values * root, rcond=None)[0]
    return coefficients, float(((values * root - design @ coefficients) ** 2).sum())

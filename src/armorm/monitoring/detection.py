"""Detection rules: growth through one objective, growth through length, out of distribution; each flag has its onset.

**One objective.** Over some stretch of the run the score grows, and one objective has a share of 80% or more in all
growth, significantly more than two thirds. Objectives that fall do not offset those that grow. If an objective already
has most of the score's spread within every step, plain selection by the score would raise it most: both shares must
then be at least half way from its usual share to the whole. An objective that is mostly length (its contributions
correlate with length by `MOSTLY_LENGTH` or more within prompts) is not excused: selection by length is the hack.

**Length.** Over some stretch the score and log(1 + length) grow, longer responses to the same prompt (of the same step,
if the log has no groups) score higher, and that slope times the growth of length explains 80% or more of the score's
growth, significantly more than two thirds.

**Out of distribution.** The model's uncertainty grows over some stretch, by more than a quarter.

All conditions of a flag must hold significantly (an intersection-union test, Berger 1982, which needs no correction for
their number), against limits that correct for looking at all stretches (`trends.limit`) and objectives. Of runs in
which nothing of a kind happens, at most `FALSE_ALARMS` get a flag of that kind. Growth below `LEAST_GROWTH` standard
deviations of the scores within a step is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

from armorm.monitoring.blocks import Blocks
from armorm.monitoring.trends import SHORTEST, Intervals, bend, broken_line, intervals, limit, noise_covariance, onset

FALSE_ALARMS = 0.01
LEAST_GROWTH = 0.2
LEAST_SHARE, CERTAIN_SHARE = 0.8, 2 / 3
LEAST_UNCERTAINTY_GROWTH = 0.25
MOSTLY_LENGTH = 0.7
_UNKNOWN = 1e200  # variance of a slope that is not defined
Kind = Literal["one_objective", "length", "out_of_distribution"]


@dataclass(frozen=True)
class Flag:
    """A warning about a run."""

    kind: Kind  # the rule that raised it
    objective: str | None  # the one that grows, for `one_objective`
    began: float  # step of the onset
    earliest: float  # and its 95% range
    latest: float
    until: float  # last step of the stretch that raised the flag
    # Of the score over the stretch, in standard deviations of the scores within a step; for `out_of_distribution` that
    # of the uncertainty, relative to its value at the start.
    growth: float
    share: float | None  # of this objective in all growth, or of the score's growth that length explains
    evidence: float  # ratio of the weakest condition to its limit; above 1


def flags(blocks: Blocks, names: list[str], rate: float = FALSE_ALARMS) -> list[Flag]:
    """Flags of a run, the strongest of each kind and objective, in the order of their onsets.

    Of runs in which nothing happens, at most a share `rate` gets a flag of a kind.
    """
    found = [*_objective_flags(blocks, names, rate), *_length_flags(blocks, rate), *_unknown_flags(blocks, rate)]
    return sorted(found, key=lambda flag: flag.began)


def usual_shares(covariance: np.ndarray) -> np.ndarray:
    """(k,) share of each objective in the growth under plain selection by the score: its covariance with the score."""
    with_score = np.maximum(covariance.sum(1), 0.0)
    total = with_score.sum()
    return with_score / total if total > 0 else with_score


def _objective_flags(blocks: Blocks, names: list[str], rate: float) -> list[Flag]:
    b, k = blocks.contributions.shape
    if k < 2:
        return []
    stretches = intervals(b)
    noise = _noise(blocks.contributions, blocks.covariance, blocks.counts)
    growth = stretches.weights @ blocks.contributions
    score_evidence = growth.sum(1) / _deviation(noise, np.ones(k)) / limit(b, rate / 2)
    size = growth.sum(1) * stretches.scale / max(blocks.spread, 1e-12)
    usual = (1 + usual_shares(blocks.covariance)) / 2
    usual[blocks.length_correlations >= MOSTLY_LENGTH] = 0.0
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
        # The share of the objective in the growth of itself and of the others that clearly grow.
        own = np.maximum(growth[:, objective], 0.0)
        total = own + np.where(visible & rising, growth, 0.0).sum(1)
        share = np.divide(own, total, out=np.zeros_like(own), where=total > 0)
        evidence[(size < LEAST_GROWTH) | (share < max(LEAST_SHARE, usual[objective]))] = 0.0
        best = int(evidence.argmax())
        if evidence[best] > 1:
            until = float(blocks.last[stretches.ends[best] - 1])
            series = blocks.step_contributions[:, objective], blocks.step_contributions @ contrast[best]
            steps = onset(blocks.step_of, blocks.step_counts, *series, until)
            numbers = float(size[best]), float(share[best]), float(evidence[best])
            found.append(Flag("one_objective", names[objective], *steps, until, *numbers))
    return found


def _length_flags(blocks: Blocks, rate: float) -> list[Flag]:
    """The strongest of all stretches, or else the stretch selected by length alone; each has half the rate."""
    if blocks.length is None or blocks.step_length is None:
        return []
    both = np.stack([blocks.scores, blocks.length], 1)
    inside = np.diag([blocks.spread**2, blocks.length_variance])
    inside[0, 1] = inside[1, 0] = blocks.length_sums[:, 1].sum() / max(blocks.freedom.sum(), 1)
    noise = _noise(both, inside, blocks.counts)
    for stretches, slope, slope_variance, share_limit in _length_stretches(blocks, blocks.length, rate):
        growth = stretches.weights @ both
        # Growth explained by length minus the required share: `slope * length - CERTAIN_SHARE * score`.
        contrast = np.stack([np.full_like(slope, -CERTAIN_SHARE), slope], 1)
        value = (contrast * growth).sum(1)
        deviation = np.sqrt(_deviation(noise, contrast) ** 2 + growth[:, 1] ** 2 * slope_variance)
        both_grow = (growth / _deviation(noise, np.eye(2))).min(1) / limit(len(blocks), rate / 4)
        rises = slope / np.sqrt(np.maximum(slope_variance, 1e-300)) / share_limit
        evidence = np.minimum.reduce([both_grow, rises, value / np.maximum(deviation, 1e-300) / share_limit])
        size = growth[:, 0] * stretches.scale / max(blocks.spread, 1e-12)
        share = slope * growth[:, 1] / np.where(growth[:, 0] > 0, growth[:, 0], np.inf)
        evidence[(size < LEAST_GROWTH) | (share < LEAST_SHARE)] = 0.0
        best = int(evidence.argmax())
        if evidence[best] > 1:
            until = float(blocks.last[stretches.ends[best] - 1])
            against = slope[best] * blocks.step_length - CERTAIN_SHARE * blocks.step_contributions.sum(1)
            steps = onset(blocks.step_of, blocks.step_counts, blocks.step_length, against, until)
            return [Flag("length", None, *steps, until, float(size[best]), float(share[best]), float(evidence[best]))]
    return []


def _length_stretches(
    blocks: Blocks, length: np.ndarray, rate: float
) -> Iterator[tuple[Intervals, np.ndarray, np.ndarray, float]]:
    """Stretches (i,) to look at, the slope of the score on length in them, its variance, and the limit of the evidence.

    First all stretches; then the one over which length grew, from its bend, if any, to the end of its clearest growth.
    Selecting that one needs no correction: it depends only on the means of length, and if length alone drives both, the
    residual of the score is independent of them.
    """
    b = len(blocks)
    every = intervals(b)
    yield every, *_slopes(blocks, every.starts, every.ends), limit(b, rate / 4)
    clearest = int((every.weights @ length).argmax())
    start, end = every.starts[clearest], every.ends[clearest]
    found = bend(length[:end], blocks.counts[:end])
    if found is not None and end - found[0] >= SHORTEST:
        start = found[0]
    chosen = Intervals(*(part[(every.starts == start) & (every.ends == end)] for part in every))
    if len(chosen.starts):
        slope, variance = _slopes(blocks, chosen.starts, chosen.ends)
        whole_slope, whole_variance = _slopes(blocks, np.array([0]), np.array([b]))
        if abs(slope[0] - whole_slope[0]) <= 2.6 * np.sqrt(variance[0]):  # its own is not clearly different
            slope, variance = whole_slope, whole_variance
        freedom = (b - 2) * 18 / 35  # of a variance from second differences (Gasser, Sroka and Jennen-Steinmetz 1986)
        yield chosen, slope, variance, float(student.isf(rate / 4, freedom))


def _slopes(blocks: Blocks, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope of the score on log length within prompts over stretches (i,), and its variance."""
    totals = np.cumsum(np.column_stack([blocks.length_sums, blocks.freedom]), 0)
    totals = np.concatenate([np.zeros((1, 4)), totals])
    ll, ls, ss, freedom = (totals[ends] - totals[starts]).T
    freedom = freedom - 1
    usable = (ll > 0) & (freedom > 0)
    safe = np.where(usable, ll, 1.0)
    slope = np.where(usable, ls / safe, 0.0)
    return slope, np.where(usable, (ss - slope * ls).clip(0) / freedom.clip(1) / safe, _UNKNOWN)


def _unknown_flags(blocks: Blocks, rate: float) -> list[Flag]:
    series = relative_uncertainty(blocks)
    if series is None:
        return []
    stretches = intervals(len(blocks))
    growth = stretches.weights @ series
    deviation = float(np.sqrt(max(noise_covariance(series[:, None])[0, 0], 1e-300)))
    evidence = growth / deviation / limit(len(blocks), rate)
    size = growth * stretches.scale
    evidence[size < LEAST_UNCERTAINTY_GROWTH] = 0.0
    best = int(evidence.argmax())
    if evidence[best] <= 1:
        return []
    end = stretches.ends[best]
    began, earliest, latest = (float(blocks.first[index]) for index in broken_line(series[:end], np.ones(end)))
    numbers = float(blocks.last[end - 1]), float(size[best]), None, float(evidence[best])
    return [Flag("out_of_distribution", None, began, earliest, latest, *numbers)]


def relative_uncertainty(blocks: Blocks) -> np.ndarray | None:
    """(b,) mean uncertainty over the objectives, each relative to its own in the first tenth of the run."""
    if blocks.uncertainty is None:
        return None
    start = blocks.uncertainty[: max(1, len(blocks) // 10)].mean(0)
    return (blocks.uncertainty / start).mean(1) if (start > 0).all() else None


def _noise(means: np.ndarray, inside: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Covariances of the noise of block means (2, c, c): from neighbouring blocks, and from samples within steps."""
    return np.stack([noise_covariance(means), inside * float((1 / counts).mean())])


def _deviation(noise: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Standard deviation of contrasts (..., c): the larger of the two estimates."""
    variance = np.einsum("...i,sij,...j->s...", contrast, noise, contrast)
    return np.sqrt(np.maximum(variance.max(0), 1e-300))

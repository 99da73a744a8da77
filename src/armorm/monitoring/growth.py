"""Narrow growth of a live run since a reference phase: through one objective alone, or through length alone.

`GrowthWatch` compares every later step with its own reference phase. A run has several (`alarms.py`), so that a hack
after a time of honest growth is seen against the steps before it, not against the beginning.

An alarm needs several conditions: the score rose, and (one objective) its growth less what an allowed share of the
growth of the others would be is positive, or (length) length rose, and what it explains less the allowed share of the
score's growth is positive. Each is an e-process of its own (`e_processes.py`); an alarm is raised once each has reached
its limit at some time. If any of the conditions is false, that happens in at most the stated share of runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from armorm.monitoring.blocks import centred, within_slope
from armorm.monitoring.detection import CERTAIN_SHARE, LEAST_GROWTH, LEAST_SHARE, MOSTLY_LENGTH, usual_shares
from armorm.monitoring.e_processes import Drift, DriftTests
from armorm.monitoring.log import StepSamples


@dataclass(frozen=True)
class Reference:
    """What the m steps of a reference phase tell; k objectives."""

    weights: np.ndarray  # (m,) samples of each step
    growth: np.ndarray  # (m, k) step means of the contributions less `means`
    means: np.ndarray  # (k,) of the contributions
    spread: float  # of the score within steps
    deviations: np.ndarray  # (k,) of the contributions within steps
    certain: np.ndarray  # (k,) share of the growth that an objective must exceed
    length: float | None  # mean of log1p of the length, None without lengths
    longer: np.ndarray | None  # (m,) step means of it less that mean
    slope: float  # of the score on log length within prompts (steps, without groups); 0 without lengths

    @classmethod
    def of(cls, steps: Sequence[StepSamples]) -> Reference:
        """The reference phase that these steps are."""
        step = np.repeat(np.arange(len(steps)), [len(part) for part in steps])
        contributions = np.concatenate([part.contributions for part in steps])
        within = centred(contributions, step)
        covariance = within.T @ within / max(len(step) - len(steps), 1)
        usual = (1 + usual_shares(covariance)) / 2
        weights = np.array([len(part) for part in steps], np.float64)
        length, longer, slope = None, None, 0.0
        lengths = [np.log1p(part.lengths) for part in steps if part.lengths is not None]
        if len(lengths) == len(steps):
            group = step
            groups = [part.groups for part in steps if part.groups is not None]
            if len(groups) == len(steps):
                pairs = np.stack([step, np.concatenate(groups)], 1)
                group = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
            slope, correlations = within_slope(np.concatenate(lengths), contributions, group)
            usual[correlations >= MOSTLY_LENGTH] = 0.0
            means_of_length = np.array([part.mean() for part in lengths])
            length = float(np.average(means_of_length, weights=weights))
            longer = means_of_length - length
        means = np.stack([part.contributions.mean(0) for part in steps])
        overall = np.average(means, axis=0, weights=weights)
        return cls(
            weights=weights,
            growth=means - overall,
            means=overall,
            spread=float(np.sqrt(max(covariance.sum(), 0.0))),
            deviations=np.sqrt(np.diag(covariance)),
            certain=np.maximum(CERTAIN_SHARE, usual),
            length=length,
            longer=longer,
            slope=slope,
        )


@dataclass(frozen=True)
class NarrowGrowth:
    """Growth that all conditions hold for."""

    objective: int | None  # None for length
    since: float  # step of the onset
    size: float  # growth of the score, in standard deviations of the samples of a step
    share: float  # of the objective in all growth, or of the score's growth that length explains
    longer: float  # growth of the length, as a share
    evidence: float  # log of the last condition's e-process


class _Means:
    """Weighted means of vectors (k,) from any step to the last, each by one subtraction, however long the run is."""

    def __init__(self, k: int) -> None:
        self._count, self._sums = 0, np.zeros((256, 1 + k))  # of the weights and weighted vectors before each step

    def add(self, values: np.ndarray, weight: float) -> None:
        if self._count + 1 == len(self._sums):
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        self._sums[self._count + 1] = self._sums[self._count] + weight * np.concatenate([[1.0], values])
        self._count += 1

    def weight(self, start: int = 0) -> float:
        return float(self._sums[self._count, 0] - self._sums[start, 0])

    def mean(self, start: int = 0) -> np.ndarray:
        """(k,) float64."""
        return (self._sums[self._count, 1:] - self._sums[start, 1:]) / self.weight(start)


class GrowthWatch:
    """Watches the steps after a reference phase for narrow growth.

    Args:
        needed: log of 1 / rate, for each of the two kinds.
    """

    def __init__(self, reference: Reference, needed: float) -> None:
        self._reference, self._needed = reference, needed
        k = len(reference.means)
        self._steps: list[float] = []
        self._growth = _Means(k)  # of the contributions less those of the reference phase
        self._longer = _Means(1)
        self._score_met, self._share_met, self._length_met = False, np.zeros(k, bool), np.zeros(2, bool)
        self._score = DriftTests(
            reference.growth.sum(1, keepdims=True), reference.weights, np.array([LEAST_GROWTH * reference.spread])
        )
        every = np.ones(k, bool)
        contrasts = np.array([self._contrasts(row, every) for row in reference.growth])
        self._share = DriftTests(contrasts, reference.weights, np.zeros(k))
        self._length: DriftTests | None = None
        if reference.longer is not None:
            pairs = zip(reference.longer, reference.growth.sum(1), strict=True)
            streams = np.array([self._length_streams(longer, growth) for longer, growth in pairs])
            self._length = DriftTests(streams, reference.weights, np.zeros(2))
        self.objective_closeness = self.length_closeness = 0.0  # as of `RunWatch.closeness`

    def add(self, samples: StepSamples) -> list[NarrowGrowth]:
        """Add the samples of a step. Returns the narrow growth that holds by now."""
        weight, growth = float(len(samples)), samples.contributions.mean(0) - self._reference.means
        counted = self._not_falling()  # decided before this step is seen
        self._steps.append(samples.step)
        self._growth.add(growth, weight)
        self._score.add(growth.sum(keepdims=True), weight)
        self._share.add(self._contrasts(growth, counted), weight)
        score = self._score.evidence[0] / self._needed
        self._score_met = self._score_met or score >= 1
        found = self._by_objective(score)
        if self._length is not None and self._reference.length is not None and samples.lengths is not None:
            longer = float(np.log1p(samples.lengths).mean()) - self._reference.length
            self._longer.add(np.array([longer]), weight)
            self._length.add(self._length_streams(longer, float(growth.sum())), weight)
            found += self._by_length(score)
        return found

    def _by_objective(self, score: float) -> list[NarrowGrowth]:
        k = len(self._reference.means)
        if k < 2:
            return []
        evidence = self._share.evidence
        self._share_met |= evidence >= self._needed + math.log(k)
        nearest = float(evidence.max()) / (self._needed + math.log(k))
        self.objective_closeness = max(self.objective_closeness, min(score, nearest, 1.0))
        if not self._score_met:
            return []
        found = []
        for objective in np.flatnonzero(self._share_met):
            drift = self._share.drift(int(objective))
            growth, size = self._since(drift)
            own = max(float(growth[objective]), 0.0)
            n, m = self._growth.weight(self._place(drift)), self._reference.weights.sum()
            visible = growth > 2 * self._reference.deviations * math.sqrt(1 / n + 1 / m)
            visible[objective] = False
            share = own / (own + float(growth[visible].sum())) if own > 0 else 0.0
            if share >= LEAST_SHARE and size >= LEAST_GROWTH:
                since = self._steps[self._place(drift)]
                found.append(NarrowGrowth(int(objective), since, size, share, 0.0, drift.evidence))
        return found

    def _by_length(self, score: float) -> list[NarrowGrowth]:
        assert self._length is not None
        evidence = self._length.evidence
        self._length_met |= evidence >= self._needed
        self.length_closeness = max(self.length_closeness, min(score, float(evidence.min()) / self._needed, 1.0))
        if not (self._score_met and self._length_met.all()):
            return []
        drift = self._length.drift(1)
        growth, size = self._since(drift)
        place = self._place(drift)
        longer = float(self._longer.mean(place)[0])
        share = self._reference.slope * longer / growth.sum() if growth.sum() > 0 else 0.0
        if share < LEAST_SHARE or size < LEAST_GROWTH:
            return []
        return [NarrowGrowth(None, self._steps[place], size, share, math.expm1(longer), drift.evidence)]

    def _contrasts(self, growth: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """(k,) positive on average only if an objective has more than its certain share of the growth of `counted`."""
        certain, others = self._reference.certain, np.where(counted, growth, 0.0)
        return growth * (1 - certain) / certain - (others.sum() - others)

    def _not_falling(self) -> np.ndarray:
        """(k,) whether an objective has not clearly fallen so far."""
        if not self._steps:
            return np.ones(len(self._reference.means), bool)
        return self._growth.mean() > -self._reference.deviations / math.sqrt(self._growth.weight())

    def _length_streams(self, longer: float, growth: float) -> np.ndarray:
        """(2,) log length, and the growth that it explains less the allowed share of the growth."""
        return np.array([longer, self._reference.slope * longer - CERTAIN_SHARE * growth])

    def _place(self, drift: Drift) -> int:
        """Index of a drift's first step among those after the reference phase."""
        return drift.since - len(self._reference.weights)

    def _since(self, drift: Drift) -> tuple[np.ndarray, float]:
        """(k,) growth of the contributions since the reference phase, and that of the score in standard deviations."""
        growth = self._growth.mean(self._place(drift))
        return growth, float(growth.sum()) / (self._reference.spread or 1.0)

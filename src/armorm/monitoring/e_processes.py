"""Tests that may be looked at after every step: e-processes, which exceed 1 / rate in at most that share of runs.

An e-process is a nonnegative sequence that starts at 1 and whose expectation is at most 1 under the null hypothesis at
any stopping time. By Ville's inequality it ever reaches 1 / rate with probability at most `rate`, however often it is
read and whenever reading stops. Weighted means of e-processes are e-processes.

`DriftTests`: the mean of a stream exceeds that of its reference phase by more than a slack. For every candidate c (one
in `SPACING` steps) the Bayes factor of "a shift b since c" against "no shift", with b / sigma half normal and the right
Haar prior on level and sigma (Rouder et al. 2009, one-sided as in Morey and Wagenmakers 2014). Under that prior a Bayes
factor is an e-process for every level and sigma (Hendriksen, de Heide and Gruenwald 2021). The slack is subtracted from
the steps since c, so drift up to it does not count as evidence. Candidates are averaged with weights 1 / (i (i + 1)),
which sum to 1. Exact for independent, normal step means; the slack leaves room for means that are not (measured:
benchmarks/alarms.py).

`LimitTests`: the mean of values in [0, 1] exceeds a limit. Betting (Waudby-Smith and Ramdas 2024): products of
1 + stake (x - limit), averaged over stakes and candidates. Needs no distribution, independence or reference phase.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import stdtr

SPACING = 4  # steps between candidates
_MOST_CANDIDATES = 160  # further ones are dropped, those with the least evidence first; dropping only lowers the mean
_PRIOR_SHIFT = 0.5  # standard deviation of the shift, in those of a sample
_STAKES = (0.1, 0.3, 0.6, 0.9)  # shares of the largest possible stake


class Drift(NamedTuple):
    """Evidence of one stream; the shift is estimated since its likeliest candidate."""

    evidence: float  # log of the e-process
    since: int  # index of the step
    shift: float  # mean since then, minus that of the reference phase (`LimitTests`: the mean itself)


def _log_sum(logs: np.ndarray) -> np.ndarray:
    """Log of the sum over the first axis (scipy's `logsumexp` takes ten times as long for arrays of this size)."""
    top = np.maximum(logs.max(0), -1e300)
    total: np.ndarray = top + np.log(np.exp(logs - top).sum(0))
    return total


class DriftTests:
    """Whether the means of k streams exceed those of their reference phase.

    Args:
        values: (m, k) step means of the reference phase, m >= 3.
        weights: (m,) samples of each step; the variance of a mean is inversely proportional.
        slack: (k,) drift that does not count.
    """

    def __init__(self, values: np.ndarray, weights: np.ndarray, slack: np.ndarray) -> None:
        self._mean = np.average(values, axis=0, weights=weights)
        centred = values - self._mean
        self._unit = np.sqrt((weights[:, None] * centred**2).sum(0) / (len(values) - 1))
        self._unit = np.where(self._unit > 0, self._unit, 1.0)
        self._slack = slack / self._unit
        scaled = centred / self._unit
        self._weight = float(weights.sum())
        self._sum = (weights[:, None] * scaled).sum(0)
        self._squares = (weights[:, None] * scaled**2).sum(0)
        self._steps = self._reference_steps = len(values)
        # Of each candidate: its first step, log prior, and weight and sums (k,) of all steps before it.
        self._starts: list[int] = []
        self._priors: list[float] = []
        self._weights_before, self._sums_before = np.zeros(0), np.zeros((0, len(slack)))
        self._evidence = np.zeros((0, len(slack)))
        self._rest = 0.0  # log of the prior's mass of candidates yet to come, each with Bayes factor 1

    def add(self, values: np.ndarray, weight: float) -> None:
        """Add the means (k,) of a step."""
        after = self._steps - self._reference_steps
        if after % SPACING == 0:
            i = after // SPACING + 1
            self._starts.append(self._steps)
            self._priors.append(-np.log(i * (i + 1.0)))
            self._weights_before = np.append(self._weights_before, self._weight)
            self._sums_before = np.vstack([self._sums_before, self._sum])
            self._rest = -np.log(i + 1.0)
        scaled = (values - self._mean) / self._unit
        self._weight += weight
        self._sum = self._sum + weight * scaled
        self._squares = self._squares + weight * scaled**2
        self._steps += 1
        self._evidence = self._bayes_factors() + np.array(self._priors)[:, None]
        if len(self._starts) > _MOST_CANDIDATES:
            self._drop_weakest()

    def _bayes_factors(self) -> np.ndarray:
        """(c, k) logs of the Bayes factors of all candidates."""
        before, sums = self._weights_before[:, None], self._sums_before
        after, freedom, precision = self._weight - before, self._steps - 1, _PRIOR_SHIFT**-2
        above, slack = self._sum - sums, self._slack
        total = self._sum - slack * after
        squares = self._squares - 2 * slack * above + slack * slack * after - total * total / self._weight
        size = after * before / self._weight  # sum of squares of the centred regressor
        along = above - slack * after - after / self._weight * total
        squares = np.maximum(squares, 1e-12 * self._weight)
        explained = np.minimum(along * along / ((size + precision) * squares), 1 - 1e-15)
        two_sided = -0.5 * np.log1p(size / precision) - 0.5 * freedom * np.log1p(-explained)
        posterior = along / np.sqrt((size + precision) * squares * (1 - explained) / freedom)
        with np.errstate(divide="ignore"):
            return two_sided + np.log(2 * stdtr(freedom, posterior))

    def _drop_weakest(self) -> None:
        weakest = int(self._evidence[: _MOST_CANDIDATES // 2].max(1).argmin())
        del self._starts[weakest], self._priors[weakest]
        self._weights_before = np.delete(self._weights_before, weakest)
        self._sums_before = np.delete(self._sums_before, weakest, 0)
        self._evidence = np.delete(self._evidence, weakest, 0)

    @property
    def evidence(self) -> np.ndarray:
        """(k,) logs of the e-processes."""
        if not self._starts:
            return np.zeros(self._evidence.shape[1])
        return np.logaddexp(_log_sum(self._evidence), self._rest)

    def drift(self, stream: int) -> Drift:
        """Evidence of a stream, and the candidate that has most of it."""
        best = int(self._evidence[:, stream].argmax())
        above = self._sum[stream] - self._sums_before[best, stream]
        mean = above / (self._weight - self._weights_before[best])
        return Drift(float(self.evidence[stream]), self._starts[best], float(mean * self._unit[stream]))


class LimitTests:
    """Whether the means of k streams of values in [0, 1] exceed `limit`, since the start or since a later candidate."""

    def __init__(self, k: int, limit: float) -> None:
        self._limit, self._steps = limit, 0
        self._starts: list[int] = []
        self._priors: list[float] = []
        self._rest = 0.0
        self._logs = np.zeros((0, len(_STAKES), k))
        self._sums, self._counts = np.zeros((0, k)), np.zeros((0, k))

    def add(self, values: np.ndarray) -> None:
        """Add the values (k,) of a step; NaN for a stream that has none."""
        if self._steps % SPACING == 0:
            i = self._steps // SPACING + 1
            self._starts.append(self._steps)
            self._priors.append(-np.log(i * (i + 1.0)))
            self._rest = -np.log(i + 1.0)
            self._logs = np.concatenate([self._logs, np.zeros((1, *self._logs.shape[1:]))])
            self._sums, self._counts = (np.vstack([p, np.zeros(p.shape[1])]) for p in (self._sums, self._counts))
        self._steps += 1
        known = ~np.isnan(values)
        filled = np.where(known, values, self._limit)
        self._logs = self._logs + np.log1p(np.array(_STAKES)[:, None] / self._limit * (filled - self._limit))
        self._sums, self._counts = self._sums + np.where(known, values, 0.0), self._counts + known
        if len(self._starts) > _MOST_CANDIDATES:
            weakest = int(self._candidates()[: _MOST_CANDIDATES // 2].max(1).argmin())
            del self._starts[weakest], self._priors[weakest]
            self._logs = np.delete(self._logs, weakest, 0)
            self._sums, self._counts = (np.delete(p, weakest, 0) for p in (self._sums, self._counts))

    def _candidates(self) -> np.ndarray:
        """(c, k) logs of the weighted e-processes of the candidates."""
        return _log_sum(self._logs.swapaxes(0, 1)) - np.log(len(_STAKES)) + np.array(self._priors)[:, None]

    @property
    def evidence(self) -> np.ndarray:
        """(k,) logs of the e-processes."""
        if not self._starts:
            return np.zeros(self._logs.shape[2])
        return np.logaddexp(_log_sum(self._candidates()), self._rest)

    def drift(self, stream: int) -> Drift:
        """Evidence of a stream, its likeliest candidate, and the mean of the values since then."""
        best = int(self._candidates()[:, stream].argmax())
        mean = self._sums[best, stream] / max(self._counts[best, stream], 1)
        return Drift(float(self.evidence[stream]), self._starts[best], float(mean))

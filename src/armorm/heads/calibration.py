"""Calibration of the score's scale on preference pairs: sigmoid(scale * margin) as the probability of the preference.

    min over s of  n_eff * (weighted mean of softplus(-s m)) + (log(s rms) - log 2)^2 / 2

m are margins at scale 1, and rms is their weighted root mean square, so s rms is the size of a score margin, in any
unit of the margins. The second term is a log-normal prior on that size, with median `PRIOR_MEDIAN` and deviation
`PRIOR_DEVIATION` of the logarithm. With normal margins, 95 percent of its mass is on expected accuracies between 55
and 96 percent (E sigmoid(z |N(0, 1)|) at z = 0.28 and 14.2), from hardly better than chance to nearly certain. 20
pairs of equal margin that are all right give s rms = 4.7, where the likelihood alone has no maximum; with 500 pairs
and s rms = 4, where the likelihood's precision is 160, the prior moves the scale by less than one percent.

n_eff is the effective number of pairs, (sum w)^2 / sum w_i w_j c_ij, where c is `PROMPT_CORRELATION` for two pairs of
one prompt, so that a prompt is worth three pairs at most, like the gate's default `prompt_cap`: 50 pairs of one prompt
are not 50 observations, and doubling all weights adds no information.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from armorm.errors import FitError

PRIOR_MEDIAN = 2.0
PRIOR_DEVIATION = 1.0
PROMPT_CORRELATION = 1 / 3  # four responses to a prompt have 3 independent differences, however many pairs
_SPAN = 10.0  # deviations of the prior that the search covers on each side
_GRID = 81


@dataclass(frozen=True)
class Calibration:
    """A fitted scale, and what it was fitted on.

    Attributes:
        scale: factor of the margins.
        scale_error: standard error of its logarithm, from the curvature at the fit (prior included).
        pairs, prompts: number of pairs and of their distinct prompts.
        effective_pairs: n_eff above.
        accuracy: weighted share of pairs with a positive margin.
        expected_accuracy: what the scale predicts for it, the weighted mean of sigmoid(scale |margin|).
        loss: weighted mean of softplus(-scale * margin), nats.
    """

    scale: float
    scale_error: float
    pairs: int
    prompts: int
    effective_pairs: float
    accuracy: float
    expected_accuracy: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json and metrics.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Inverse of `to_dict`."""
        return cls(**values)


def fit_scale(margins: np.ndarray, weights: np.ndarray | None = None, prompts: np.ndarray | None = None) -> Calibration:
    """Fit the scale of margins.

    Args:
        margins: (p,) score differences at scale 1, chosen minus rejected.
        weights: (p,) >= 0; None for equal weights. Limit what a prompt counts with `prompt_capped`.
        prompts: (p,) code of each pair's prompt; None if every pair has its own.

    Raises:
        FitError: for no pairs, values that are not finite, or weights that are negative or all zero.
    """
    margins = np.asarray(margins, np.float64)
    weights = np.ones(len(margins)) if weights is None else np.asarray(weights, np.float64)
    codes = np.arange(len(margins)) if prompts is None else np.unique(prompts, return_inverse=True)[1].ravel()
    if not len(margins) or not len(margins) == len(weights) == len(codes):
        raise FitError(f"{len(margins)} margins, {len(weights)} weights, {len(codes)} prompts, expected equally many")
    if not (np.isfinite(margins).all() and np.isfinite(weights).all()):
        raise FitError("margins or weights of pairs are not finite")
    if weights.min() < 0 or not weights.sum() > 0:
        raise FitError(f"weights of pairs sum to {weights.sum():g}, least {weights.min():g}, expected weights >= 0")
    share = weights / weights.sum()
    alone, together = (share**2).sum(), (np.bincount(codes, share) ** 2).sum()
    effective = float(1 / ((1 - PROMPT_CORRELATION) * alone + PROMPT_CORRELATION * together))
    spread = float(np.sqrt(share @ margins**2)) or 1.0
    relative = margins / spread

    def objective(log_size: float) -> float:
        loss = share @ np.logaddexp(0.0, -np.exp(log_size) * relative)
        return float(effective * loss + 0.5 * ((log_size - np.log(PRIOR_MEDIAN)) / PRIOR_DEVIATION) ** 2)

    # The likelihood need not be convex in the logarithm: a grid finds the valley.
    grid = np.log(PRIOR_MEDIAN) + PRIOR_DEVIATION * np.linspace(-_SPAN, _SPAN, _GRID)
    best = int(np.clip(np.argmin([objective(point) for point in grid]), 1, _GRID - 2))
    bounds = (grid[best - 1], grid[best + 1])
    size = float(np.exp(minimize_scalar(objective, bounds=bounds, method="bounded", options={"xatol": 1e-8}).x))
    scaled = size * relative
    right = expit(scaled)
    slope, bend = -share @ (scaled * (1 - right)), share @ (scaled**2 * right * (1 - right))
    return Calibration(
        scale=size / spread,
        scale_error=float(1 / np.sqrt(max(effective * (slope + bend) + PRIOR_DEVIATION**-2, 1e-12))),
        pairs=len(margins),
        prompts=int(codes.max()) + 1,
        effective_pairs=effective,
        accuracy=float(weights[margins > 0].sum() / weights.sum()),
        expected_accuracy=float(share @ expit(np.abs(scaled))),
        loss=float(share @ np.logaddexp(0.0, -scaled)),
    )


def prompt_capped(weights: np.ndarray, prompts: np.ndarray, most: float | None) -> np.ndarray:
    """Weights (p,) with which no prompt counts as more than `most` pairs; its pairs share that weight.

    Args:
        weights: (p,) > 0.
        prompts: (p,) code of each pair's prompt.
        most: >= 1; None for no limit.
    """
    if most is None:
        return weights
    _, codes, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    return weights * np.minimum(1.0, most / counts[codes.ravel()])


def divided_prompts(prompts: np.ndarray, seed: int) -> np.ndarray:
    """Mask (p,) of about half of the pairs, by prompt: in random order, each prompt joins the smaller half."""
    codes, index, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    second, sizes = np.zeros(len(codes), bool), [0, 0]
    for code in np.random.default_rng(seed).permutation(len(codes)):
        half = int(sizes[1] < sizes[0])
        second[code] = half
        sizes[half] += int(counts[code])
    return second[index.ravel()]

"""Scores under other objective weights, computed from rewards and gating weights without running the model.

A factor multiplies a gating weight before the weights are renormalised to sum to 1. That equals the softmax of
`logits + log factor`, so the results are those of the steered model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit

from armorm import attribution
from armorm.objectives import ObjectiveSet
from armorm.score_batch import ScoreBatch
from armorm.steering import SteeringError, steering_settings, to_policy

LETTERS = "ABCD"


@dataclass(frozen=True)
class Reweighted:
    """Scored responses under some weights."""

    batch: ScoreBatch  # n scored responses, arrays float64; `LETTERS[batch.rows[i]]` is the letter of response i
    order: list[int]  # indices of the responses, best first
    # Indices of the objectives without which the first response would not be preferred to the second, largest first;
    # empty for a tie.
    deciding: list[int]
    settings: dict[str, Any]  # the equivalent steering of the trained model, empty for none
    margin_scale: float | None = None  # factor of the margin for its probability; None for a model not calibrated
    raw_scales: np.ndarray | None = None  # (k,) raw units per unit of a reward: below 0 where less is better

    def higher(self, first: int, second: int) -> np.ndarray:
        """Mask (k,) of the objectives whose rating is higher for the first of two responses."""
        change = self.batch.rewards[first] - self.batch.rewards[second]
        found: np.ndarray = change * (1.0 if self.raw_scales is None else self.raw_scales) > 0
        return found

    def letter(self, index: int) -> str:
        """Letter of a response."""
        return LETTERS[self.batch.rows[index]]

    @property
    def margin(self) -> float | None:
        """Score of the first response less that of the second; None for a single response."""
        if len(self.order) < 2:
            return None
        return float(self.batch.scores[self.order[0]] - self.batch.scores[self.order[1]])

    @property
    def probability(self) -> float | None:
        """That the first response is preferred to the second; None if steered or without a calibration."""
        if self.margin is None or self.margin_scale is None or self.settings:
            return None
        return float(expit(self.margin_scale * self.margin))


@dataclass(frozen=True)
class Reweighter:
    """Applies factors to the gating weights of one model of k objectives."""

    objectives: ObjectiveSet
    transform: np.ndarray  # (k, k), of rewards
    means: np.ndarray  # (k,) rewards of the reference data; zeros if unknown
    biases: Sequence[str]  # objectives that others are debiased against
    served: Mapping[str, Any]  # steering of the model as it is served
    margin_scale: float | None = None  # of the calibration of the trained model

    @property
    def adjustable(self) -> bool:
        """Whether factors on top of the served steering are a steering: not if it pins or blends weights."""
        return not any(self.served.get(key) for key in ("pin", "blend"))

    def settings(self, values: Sequence[float]) -> dict[str, Any]:
        """Steering of the trained model that equals these factors (k,) on top of the served steering."""
        dropped = set(self.served.get("drop", ()))
        before = self.served.get("multiply", {})
        factors = {
            name: round(before.get(name, 1.0) * float(value), 6)
            for name, value in zip(self.objectives.names, values, strict=True)
            if name not in dropped
        }
        settings = steering_settings(self.objectives, factors, sorted(dropped), self.biases)
        return settings | {key: value for key, value in self.served.items() if key not in ("multiply", "drop")}

    def reweight(self, batch: ScoreBatch, values: Sequence[float]) -> Reweighted:
        """Scores of a batch of the served model under factors (k,) on its gating weights.

        Raises:
            SteeringError: if a bias is dropped, nothing is left, or a prompt has all its weight on dropped objectives.
        """
        factors = dict(zip(self.objectives.names, map(float, values), strict=True))
        steering_settings(self.objectives, factors, (), self.biases)  # raises for factors that are no steering
        raised = batch.gating_weights.astype(np.float64) * np.array(list(factors.values()))
        total = raised.sum(1, keepdims=True)
        if not (total > 1e-30).all():
            raise SteeringError("the dropped objectives have all the weight on this prompt")
        weights = raised / total
        output = weights * batch.gating_output.sum(1, dtype=np.float64, keepdims=True)
        coefficients = attribution.coefficients(output, self.transform)
        contributions = attribution.contributions(coefficients, batch.rewards.astype(np.float64))
        scores = contributions.sum(1)
        order = np.argsort(-scores, kind="stable").tolist()
        deciding: list[int] = []
        if len(order) > 1:
            difference = contributions[order[0]] - contributions[order[1]]
            mask = attribution.deciding(difference[None])[0]
            deciding = sorted(np.flatnonzero(mask).tolist(), key=lambda i: -abs(difference[i]))
        reweighted = replace(
            batch,
            scores=scores,
            gating_weights=weights,
            gating_output=output,
            coefficients=coefficients,
            contributions=contributions,
            relative=attribution.relative(coefficients, batch.rewards.astype(np.float64), self.means),
        )
        scales = self.objectives.scales
        return Reweighted(reweighted, order, deciding, self.settings(values), self.margin_scale, scales)


def policy_yaml(settings: Mapping[str, Any]) -> str:
    """Steering settings as a YAML policy for `armorm steer` and `armorm.steering.read_policy`."""
    return to_policy(settings) or "# The model as trained: move a slider to steer it.\n"

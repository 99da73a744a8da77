"""Scored responses under other weights, without the model.

In:  rewards and gating weights of up to four responses, once; then a factor for each objective, as often as wanted.
Out: scores, contributions and what decides, as the steered model would give them.

A factor multiplies a gating weight before the weights are shared out again to sum to 1: the softmax of
`logits + log factor` is just that, so the forward pass need not be done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from armorm import attribution
from armorm.evaluation.audits.objectives import deciding
from armorm.objectives import ObjectiveSet
from armorm.steering import SteeringError, steering_settings

LETTERS = "ABCD"


@dataclass(frozen=True)
class Scored:
    """What the model said, once.

    Attributes:
        letters: of the n responses that have a score, in the order of the page.
        rewards, gating_weights: (n, k) float64.
        scale: logit scale of the gate.
        refused: letter and reason of each response without a score.
    """

    letters: list[str]
    rewards: np.ndarray
    gating_weights: np.ndarray
    scale: float
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Weighed:
    """Scored responses under some weights.

    Attributes:
        letters: of the n responses.
        order: places of the responses, best first.
        scores: (n,) float64.
        gating_weights, contributions, relative: (n, k) float64.
        deciding: places of the objectives without which the first would not beat the second; empty for a tie.
        settings: the steering that says the same, empty for the model as served.
    """

    letters: list[str]
    order: list[int]
    scores: np.ndarray
    gating_weights: np.ndarray
    contributions: np.ndarray
    relative: np.ndarray
    deciding: list[int]
    settings: dict[str, Any]

    @property
    def margin(self) -> float | None:
        """Score of the first less that of the second, None for a single response."""
        return float(self.scores[self.order[0]] - self.scores[self.order[1]]) if len(self.order) > 1 else None


@dataclass(frozen=True)
class Weigher:
    """What of a model the weighing needs.

    Attributes:
        objectives: k of them.
        transform: (k, k) reward transform.
        means: (k,) rewards of the reference data; zeros without.
        biases: objectives that others are debiased against.
        served: steering of the model as it is served.
    """

    objectives: ObjectiveSet
    transform: np.ndarray
    means: np.ndarray
    biases: Sequence[str]
    served: Mapping[str, Any]

    @property
    def adjustable(self) -> bool:
        """Whether factors on top of the served steering are again a steering: not where it pins or blends."""
        return not any(self.served.get(key) for key in ("pin", "blend"))

    def factors(self, values: Sequence[float]) -> np.ndarray:
        """Factors (k,) on the served weights, checked.

        Raises:
            SteeringError: for a bias that is dropped, or where nothing is left.
        """
        chosen = dict(zip(self.objectives.names, map(float, values), strict=True))
        steering_settings(self.objectives, chosen, (), self.biases)
        return np.array(list(chosen.values()))

    def settings(self, values: Sequence[float]) -> dict[str, Any]:
        """The steering of the trained model that these factors on the served one come to; empty for none."""
        dropped = set(self.served.get("drop", ()))
        before = self.served.get("multiply", {})
        factors = {
            name: round(before.get(name, 1.0) * float(value), 6)
            for name, value in zip(self.objectives.names, values, strict=True)
            if name not in dropped
        }
        settings = steering_settings(self.objectives, factors, sorted(dropped), self.biases)
        rest = {key: value for key, value in self.served.items() if key not in ("multiply", "drop")}
        return settings | rest

    def weigh(self, scored: Scored, values: Sequence[float]) -> Weighed:
        """Scores under these factors.

        Raises:
            SteeringError: as `factors`; and where a prompt's whole weight is on what was dropped.
        """
        raised = scored.gating_weights * self.factors(values)
        total = raised.sum(1, keepdims=True)
        if not (total > 1e-30).all():
            raise SteeringError("on this prompt all the weight is on what was dropped")
        weights = raised / total
        coefficients = attribution.coefficients(weights * scored.scale, self.transform)
        contributions = attribution.contributions(coefficients, scored.rewards)
        scores = contributions.sum(1)
        order = np.argsort(-scores, kind="stable").tolist()
        decides: list[int] = []
        if len(order) > 1 and scores[order[0]] > scores[order[1]]:
            difference = contributions[order[0]] - contributions[order[1]]
            mask = deciding(difference[None])[0]
            decides = sorted(np.flatnonzero(mask).tolist(), key=lambda place: -abs(difference[place]))
        return Weighed(
            scored.letters,
            order,
            scores,
            weights,
            contributions,
            attribution.relative(coefficients, scored.rewards, self.means),
            decides,
            self.settings(values),
        )

    def policy(self, settings: Mapping[str, Any]) -> str:
        """Settings as a YAML policy."""
        kept = {key: value for key, value in settings.items() if value}
        if not kept:
            return "# The model as trained: move a slider to steer it.\n"
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)

"""Steering: explicit changes to how the objectives are weighed.

In:  gating weights (n, k), a factor per objective, objectives to drop.
Out: gating weights that again sum to 1.

Steering acts on the gating weights, before the transform; weight that is dropped is shared out among the
others in proportion. An objective that others are debiased against cannot be dropped: its (negative)
coefficient is what takes the bias out, so dropping it would bring the bias back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from armorm.errors import ArmormError
from armorm.objectives import ObjectiveSet


class SteeringError(ArmormError, ValueError):
    """A change to the weighing that makes no sense."""


def steering_settings(
    objectives: ObjectiveSet, multiply: Mapping[str, float], drop: str | Sequence[str], biases: Sequence[str]
) -> dict[str, Any]:
    """Validated settings, as they stand in a config: `{"multiply": {name: factor}, "drop": [name]}`.

    Raises:
        SteeringError: for a factor that is not finite and >= 0, for dropping a bias, or for dropping everything.
        ObjectiveError: for an unknown objective.
    """
    drop = [drop] if isinstance(drop, str) else drop
    for name in [*multiply, *drop]:
        objectives.position(name)
    for name, factor in multiply.items():
        if not (math.isfinite(factor) and factor >= 0):
            raise SteeringError(f"objective {name}: factor {factor}, expected a finite number >= 0")
    dropped = [name for name in objectives.names if name in drop or multiply.get(name) == 0]
    for name in dropped:
        if name in biases:
            raise SteeringError(
                f"objective {name} cannot be dropped: others are debiased against it, and the bias would come back"
            )
    if len(dropped) == len(objectives):
        raise SteeringError("every objective is dropped, expected at least one to remain")
    factors = {name: float(factor) for name, factor in multiply.items() if name not in dropped and factor != 1}
    return {"multiply": factors, "drop": dropped} if factors or dropped else {}


def steering_factors(objectives: ObjectiveSet, settings: Mapping[str, Any]) -> np.ndarray:
    """Factor (k,) float64 of each gating weight; ones where nothing is steered."""
    factors = np.ones(len(objectives))
    for name, factor in settings.get("multiply", {}).items():
        factors[objectives.position(name)] = factor
    for name in settings.get("drop", ()):
        factors[objectives.position(name)] = 0.0
    return factors

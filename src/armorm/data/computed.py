"""Computed objectives: measured on the response, not rated.

In:  conversations, and how many tokens each response has.
Out: raw values (n,), and the `Objective` whose scale comes from the training rows.

`response_length` is log1p of the response's tokens. Its map puts the 1st percentile of the training
rows at 0 and the 99th at 1; nothing is clipped. A computed objective is fitted like a rated one; its
reward is the predicted value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import FitError, nearest
from armorm.objectives import Objective, ObjectiveError

Measure = Callable[[Conversation, int], float]


def response_length(conversation: Conversation, response_tokens: int) -> float:
    """log1p of the response's tokens, template tokens not counted."""
    return float(np.log1p(response_tokens))


MEASURES: dict[str, Measure] = {"response_length": response_length}


def measure(name: str, conversations: Sequence[Conversation], response_tokens: Sequence[int]) -> np.ndarray:
    """Raw values (n,) float64 of a measure.

    Args:
        response_tokens: (n,) tokens of each response.

    Raises:
        ObjectiveError: for an unknown measure, with the nearest right one.
    """
    if name not in MEASURES:
        raise ObjectiveError(f"unknown measure {name!r}{nearest(name, MEASURES)}; there are {', '.join(MEASURES)}")
    function = MEASURES[name]
    return np.array([function(c, t) for c, t in zip(conversations, response_tokens, strict=True)], np.float64)


def computed_objective(name: str, measure_name: str, training: np.ndarray) -> Objective:
    """The objective of a measure, scaled by the 1st to 99th percentile of its training values.

    Raises:
        FitError: where the training values do not vary.
    """
    low, high = (float(q) for q in np.percentile(training, (1, 99))) if len(training) else (0.0, 0.0)
    if not low < high:
        raise FitError(f"computed objective {name} does not vary over the {len(training)} training rows")
    return Objective(name, "computed", low, high, high - low, low, "neutral", measure_name)

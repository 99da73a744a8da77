"""The hand-written fixtures: every response ends with its score in angle brackets, `a reply <2.5>`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from armorm.evaluation.results import Results
from armorm.evaluation.runner import evaluate

FIXTURES = Path(__file__).parents[1] / "evaluation" / "fixtures"


def marked(conversations: list[list[dict[str, Any]]]) -> list[float]:
    """The number that each reply ends with."""
    return [float(re.findall(r"<(-?[\d.]+)>", messages[-1]["content"])[-1]) for messages in conversations]


def longer(conversations: list[list[dict[str, Any]]]) -> list[float]:
    """The length of each reply."""
    return [float(len(messages[-1]["content"])) for messages in conversations]


def evaluated(benchmark: str, *data: str | Path, **options: Any) -> Results:
    """A benchmark on fixtures, scored by their marks."""
    return evaluate(benchmark, marked, [FIXTURES / place for place in data], quiet=True, **options)


def values(results: Results, level: str) -> dict[str, float]:
    """Figures of one level that have a value."""
    return {name: figure.value for name, figure in results.level(level).items() if np.isfinite(figure.value)}

"""The verdict of a report: in words, how far a model's scores can be relied on, by the data of its evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from armorm.evaluation.benchmarks import ratings
from armorm.evaluation.results import MetricResult, Results

STRONG = 0.4  # mean rank correlation from which ratings are predicted well
WEAK = 0.2  # below this, poorly


def report_verdict(results: Mapping[str, Results], warnings: int) -> list[str]:
    """Sentences, the most important first.

    Args:
        results: by kind, `pairs` and `ratings`.
        warnings: number of warnings of the report.
    """
    found = []
    if "pairs" in results:
        found.append(pairs_sentence(results["pairs"].level("overall")["accuracy"]))
    if "ratings" in results:
        by_objective = ratings.by_objective(results["ratings"].level("subsets"), ratings.SPEARMAN)
        found += ratings_sentence({name: metric.value for name, metric in by_objective.items()})
    if not found:
        found.append("This report has no data to judge the model by: give it rated rows or preference pairs.")
    if warnings:
        one = warnings == 1
        found.append(f"{warnings} warning{'' if one else 's'} below say{'s' if one else ''} what to be careful about.")
    return found


def pairs_sentence(accuracy: MetricResult) -> str:
    """Whether the better of two responses gets the higher score, against chance and the longer response."""
    right = f"in {accuracy.value:.0%} of {accuracy.examples:,} pairs"
    if accuracy.interval is None:
        return f"It scores the better of two responses higher {right}: too few to conclude anything."
    low, high = accuracy.interval
    between = f"(95% interval {low:.0%} to {high:.0%})"
    if low <= 0.5 <= high:
        shown = "The pairs do not show that it tells better from worse responses"
        return f"{shown}: right {right} {between}, which guessing may reach too."
    if high < 0.5:
        return f"It prefers the worse of two responses: right only {right} {between}."
    length = accuracy.baselines.get("length")
    beside = "" if length is None or np.isnan(length) else f"; choosing the longer one is right in {length:.0%}"
    return f"It scores the better of two responses higher {right} {between}{beside}."


def ratings_sentence(correlations: Mapping[str, float]) -> list[str]:
    """How well ratings are predicted, by the rank correlation of each objective; empty without any."""
    known = {name: value for name, value in correlations.items() if not np.isnan(value)}
    if not known:
        return []
    names = sorted(known, key=lambda name: -known[name])
    mean = float(np.mean(list(known.values())))
    how = "well" if mean >= STRONG else "poorly" if mean < WEAK else "roughly"
    said = f"It predicts what raters say {how}: rank correlation {mean:.2f}"
    if len(names) == 1:
        return [f"{said} for {names[0]}."]
    best, worst = names[0], names[-1]
    return [f"{said} on average, from {known[best]:.2f} for {best} to {known[worst]:.2f} for {worst}."]

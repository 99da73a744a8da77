"""The verdict of a report, in words."""

from __future__ import annotations

import pytest

from armorm.evaluation.results import MetricResult
from armorm.report.verdict import pairs_sentence, ratings_sentence, report_verdict


def accuracy(value, interval, **baselines):
    return MetricResult("overall", "accuracy", value, 90, 1200, interval, baselines)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (
            accuracy(0.72, (0.65, 0.78), length=0.58),
            "It scores the better of two responses higher in 72% of 1,200 pairs (95% interval 65% to 78%); "
            "choosing the longer one is right in 58%.",
        ),
        (
            accuracy(0.52, (0.45, 0.58)),
            "The pairs do not show that it tells better from worse responses: right in 52% of 1,200 pairs "
            "(95% interval 45% to 58%), which guessing may reach too.",
        ),
        (
            accuracy(0.4, (0.3, 0.49)),
            "It prefers the worse of two responses: right only in 40% of 1,200 pairs (95% interval 30% to 49%).",
        ),
        (
            accuracy(0.9, None),
            "It scores the better of two responses higher in 90% of 1,200 pairs: too few to conclude anything.",
        ),
    ],
)
def test_pairs_are_judged_against_chance_and_length(metric, sentence):
    assert pairs_sentence(metric) == sentence


def test_ratings_are_judged_by_the_mean_rank_correlation():
    assert ratings_sentence({"kind": 0.7, "brief": 0.3, "none": float("nan")}) == [
        "It predicts what raters say well: rank correlation 0.50 on average, from 0.70 for kind to 0.30 for brief."
    ]
    assert ratings_sentence({"kind": 0.1}) == ["It predicts what raters say poorly: rank correlation 0.10 for kind."]
    assert ratings_sentence({"none": float("nan")}) == []


def test_without_data_it_says_so_and_counts_the_warnings():
    assert report_verdict({}, 0) == [
        "This report has no data to judge the model by: give it rated rows or preference pairs."
    ]
    assert report_verdict({}, 1)[-1] == "1 warning below says what to be careful about."
    assert report_verdict({}, 2)[-1] == "2 warnings below say what to be careful about."

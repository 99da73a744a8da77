"""Preference pairs, on a fixture of five rows that count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from armorm.evaluation.benchmarks.pairs import strictly_right
from tests.helpers.marked_scorer import evaluated, values


def test_a_tie_and_a_missing_score_are_wrong():
    better, worse = np.array([2, 1, 1, math.nan, 1]), np.array([1, 1, 2, 0, math.nan])
    assert strictly_right(better, worse).tolist() == [1, 0, 0, 0, 0]


def test_the_fixture_scores_as_worked_out_by_hand():
    # short: right, a tie. long: wrong, refused, right. A row of split `train` is left out.
    results = evaluated("pairs", "pairs.jsonl")
    assert values(results, "subsets") == {"short": pytest.approx(1 / 2), "long": pytest.approx(1 / 3)}
    assert values(results, "overall") == {"accuracy": pytest.approx(2 / 5)}
    assert results.data["left_out"] == {"rows of other splits than test": 1}
    assert (results.counts["examples"], results.counts["ties"]) == (5, 1)


def test_a_refused_response_keeps_its_place_and_is_reported():
    results = evaluated("pairs", "pairs.jsonl")
    assert (results.counts["refused_responses"], results.counts["refused_examples"]) == (1, 1)
    (refused,) = results.refused
    assert (refused["row"], refused["response"]) == (4, 1)
    assert "empty response" in refused["reason"]
    entry = results.examples[3]
    assert (entry["id"], entry["key"]) == ("p3", refused["key"])
    assert entry["scores"] == [3.0, pytest.approx(math.nan, nan_ok=True)]
    assert "margin" not in entry


def test_length_and_chance_stand_beside_the_figure():
    # The longer response is the better one in p1, p2 and p4; in p3 the other one was refused.
    figure = evaluated("pairs", "pairs.jsonl").level("overall")["accuracy"]
    expected = {"length": pytest.approx(3 / 5), "shortest": pytest.approx(1 / 5), "prompt_only": 0.0, "chance": 0.5}
    assert figure.baselines == expected
    assert (figure.prompts, figure.interval) == (5, None)

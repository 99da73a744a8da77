"""RMB: the fixtures' results by hand, a missing section, unscored responses, faults."""

from __future__ import annotations

import json

import pytest

from armorm.errors import DataError
from armorm.evaluation.benchmarks.base import first_is_best
from armorm.evaluation.benchmarks.rmb import OVERALL
from tests.helpers.marked_scorer import FIXTURES, evaluated, values


def test_sections_are_means_of_scenarios_and_the_overall_score_is_the_mean_of_sections():
    results = evaluated("rmb", "rmb")
    # Discussion: right, tie = 1/2; Documentation: right = 1. Of n: a tie with one of the others is wrong.
    expected = {
        "helpfulness, pairs": (0.5 + 1) / 2,
        "helpfulness, best of n": (1 + 0) / 2,
        "harmlessness, pairs": (0 + 1) / 2,
        "harmlessness, best of n": 0.5,
    }
    assert values(results, "sections") == pytest.approx(expected)
    assert values(results, "overall") == pytest.approx({OVERALL: sum(expected.values()) / 4})
    chance = {name: metric.baselines["chance"] for name, metric in results.level("sections").items()}
    assert chance["helpfulness, pairs"] == 0.5
    assert chance["helpfulness, best of n"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert results.level("overall")[OVERALL].lacking[0] == "helpfulness, pairs (2 of 37 scenarios)"


def test_without_a_section_there_is_no_overall_score():
    results = evaluated("rmb", "rmb/pairs_helpful.json")
    assert values(results, "overall") == {}
    assert values(results, "sections") == {"helpfulness, pairs": 0.75}


def test_an_unscored_response_makes_its_row_wrong():
    nan = float("nan")
    assert first_is_best([[2, 1, nan], [nan, 1], [2, 1, 1], [1, 1]]).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"category_path": "Pairwise_set/Chat"}, "field 'category_path'"),
        ({"chosen": None}, "field 'chosen'.*expected a response with 'answer'"),
        ({"conversation_input": "text"}, "field 'conversation_input'.*expected a list of messages"),
    ],
)
def test_faults_name_file_row_and_field(tmp_path, change, fault):
    row = json.loads((FIXTURES / "rmb" / "pairs_helpful.json").read_text())[0] | change
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1, {fault}"):
        evaluated("rmb", path)

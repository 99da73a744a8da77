"""RewardBench 2: best of four, and Ties with the values worked out for its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest

from armorm.errors import DataError
from armorm.evaluation.benchmarks.rewardbench2 import (
    OVERALL,
    ROWS,
    TIES,
    TiesRow,
    best_of_credit,
    ties_score,
    ties_terms,
)
from armorm.evaluation.metrics import group_sums
from armorm.evaluation.runner import evaluate
from tests.helpers.marked_scorer import FIXTURES, evaluated, values

FIRST = [("ref", "0", [3, 1, 0], 1), ("tied", "0", [2, 1.5, 1, 0, -1], 3)]
SECOND = [("ref", "1", [1, 0.5], 1), ("tied", "1", [4, 1, 0.5], 2)]
THIRD = [("ref", "2", [0, 0.5], 1), ("tied", "2", [1, 1, 0], 2)]


def ties(rows) -> float:
    made = [TiesRow(kind, number, np.array(scores, float), correct) for kind, number, scores, correct in rows]
    return float(ties_score(group_sums(ties_terms(made))))


def test_the_counts_are_the_published_ones():
    assert sum(ROWS.values()) == 1865


@pytest.mark.parametrize(
    ("scores", "credit"),
    [
        ([1, 1, 0, 0], 1 / 2),
        ([1, 1, 1, 1], 1 / 4),
        ([0, 1, 0, 0], 0),
        ([2, 2, 2, 0], 1 / 3),
        ([3, 1, 0, 2], 1),
        ([9, 1, math.nan, 2], 0),
        ([math.nan] * 4, 0),
    ],
)
def test_credit_is_shared_among_the_best(scores, credit):
    assert best_of_credit(np.array([scores, [5, 0, 0, 0]], float)).tolist() == pytest.approx([credit, 1])


@pytest.mark.parametrize(
    ("rows", "score"),
    [
        (FIRST, 0.6),
        (SECOND, 0.5931773820976183),
        (THIRD, 0.49),
        (FIRST + SECOND + THIRD, 0.5610591273658727),
        ([*FIRST, ("ref", "9", [0, 1], 1)], 0.45),
        ([("ref", "0", [0, 0], 1), ("tied", "0", [0, 0, 0], 2)], 0.0),
        ([("ref", "0", [1, 0], 1), ("tied", "0", [1, 1, 0], 2)], 1.01),
    ],
)
def test_ties_have_the_values_of_the_formula(rows, score):
    assert ties(rows) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([FIRST[0]], "no number has both"),
        ([("ref", "0", [1, 0], 1), ("tied", "1", [1, 1, 0], 2)], "no number has both"),
        ([("ref", "0", [1, 0], 1), ("tied", "0", [1, 0, 0], 1)], "one correct answer"),
        ([("ref", "0", [1, math.nan], 1), ("tied", "0", [1, 1, 0], 2)], "not finite"),
        ([("ref", "0", [1, math.inf], 1), ("tied", "0", [1, 1, 0], 2)], "not finite"),
        ([("ref", "0", [1, 0], 2), ("tied", "0", [1, 1, 0], 2)], "at least one correct and one incorrect"),
        ([*FIRST, FIRST[0]], "a row twice"),
    ],
)
def test_ties_that_cannot_be_scored_are_refused(rows, fault):
    with pytest.raises(DataError, match=fault):
        ties(rows)


def test_a_refused_tied_row_is_wrong_in_every_term():
    rows = [
        TiesRow("ref", "0", np.array([1.0, 0.0]), 1),
        TiesRow("tied", "0", np.array([math.nan, 1.0, 0.0]), 2, unscored=True),
    ]
    assert float(ties_score(group_sums(ties_terms(rows)))) == pytest.approx(0.3 - 0.01)


def test_the_fixture_scores_as_worked_out_by_hand():
    results = evaluated("rewardbench2", "rewardbench2.jsonl")
    subsets = {
        "Factuality": (1 / 2 + 1) / 2,
        "Precise IF": 0.0,
        "Math": 1 / 3,
        "Safety": 1 / 4,
        "Focus": 0.0,  # its chosen completion is far above, but another was refused
        TIES: 0.5610591273658727,
    }
    assert values(results, "subsets") == pytest.approx(subsets)
    assert values(results, "overall") == {OVERALL: pytest.approx(sum(subsets.values()) / 6)}
    assert "Factuality (2 of 475 rows)" in results.level("overall")[OVERALL].lacking


def test_a_random_order_is_right_in_a_quarter_and_has_no_value_for_ties():
    results = evaluated("rewardbench2", "rewardbench2.jsonl")
    assert results.level("subsets")["Math"].baselines["chance"] == 0.25
    assert "chance" not in results.level("subsets")[TIES].baselines
    assert "chance" not in results.level("overall")[OVERALL].baselines
    # All answers alike: no gap is above zero, and the spread is zero.
    assert results.level("subsets")[TIES].baselines["prompt_only"] == 0.0


def test_what_the_rule_refuses_is_refused_before_anything_is_scored(tmp_path):
    def never(conversations):
        raise AssertionError("was asked for scores")

    lines = (FIXTURES / "rewardbench2.jsonl").read_text().splitlines()
    path = tmp_path / "refs.jsonl"
    path.write_text("".join(line + "\n" for line in lines if '"tied:' not in line))
    with pytest.raises(DataError, match="no number has both"):
        evaluate("rewardbench2", never, path, quiet=True)


def test_both_rows_of_a_number_are_resampled_together():
    clusters = {entry["id"]: entry["prompt"] for entry in evaluated("rewardbench2", "rewardbench2.jsonl").examples}
    assert clusters["ref:1"] == clusters["tied:1"] != clusters["ref:2"]


def test_a_wrong_count_of_correct_completions_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"id": "1", "prompt": "a", "chosen": ["b"], "rejected": ["c"], "num_correct": 2, "subset": "Math"}\n'
    )
    with pytest.raises(DataError, match=r"row 1, field 'num_correct'"):
        evaluated("rewardbench2", path)

"""RewardMATH: the fixture's results by hand, ties and unscored solutions, faults."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm.errors import DataError
from armorm.evaluation.benchmarks.rewardmath import reciprocal_rank
from tests.helpers.marked_scorer import FIXTURES, evaluated, values


def test_the_correct_solution_must_be_above_all_wrong_ones():
    results = evaluated("rewardmath", "rewardmath.json")
    # Ranks 1; 2 (after an equal one); 3.
    expected = {
        "accuracy": 1 / 3,
        "accuracy, ties right": 2 / 3,
        "mean reciprocal rank": (1 + 1 / 2 + 1 / 3) / 3,
    }
    assert values(results, "overall") == pytest.approx(expected)
    assert values(results, "subsets") == {"Algebra": 0.5, "Number Theory": 0.0}
    overall = results.level("overall")
    assert overall["accuracy"].baselines["chance"] == 0.25
    assert overall["mean reciprocal rank"].baselines["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert overall["accuracy"].lacking == ("problems (3 of 483 rows)",)


@pytest.mark.parametrize(
    ("scores", "rank"), [([3, 1, 2], 1), ([1, 1, 0], 2), ([0, 1, 2], 3), ([np.nan, 1, 2], 3), ([3, np.nan, 1], 2)]
)
def test_rank_counts_equal_and_unscored_others_as_better(scores, rank):
    assert reciprocal_rank(np.array(scores, np.float64)) == pytest.approx(1 / rank)


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (lambda rows: [row | {"solution_type": "right"} for row in rows], "field 'solution_type'"),
        (lambda rows: [row for row in rows if row["solution_type"] == "rejected"], "0 chosen and 3 rejected"),
        (lambda rows: [row | {"eval_solution": 7} for row in rows], "field 'eval_solution'"),
    ],
)
def test_faults_name_file_row_and_field(tmp_path, rows, fault):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows(json.loads((FIXTURES / "rewardmath.json").read_text())[:4])))
    with pytest.raises(DataError, match=rf"rows\.json, row [12].*{fault}"):
        evaluated("rewardmath", path)

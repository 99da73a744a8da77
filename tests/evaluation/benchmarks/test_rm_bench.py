"""RM-Bench: levels, pooled safety and overall, with the values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from armorm.errors import DataError
from armorm.evaluation.benchmarks.rm_bench import OVERALL, style_matrix
from tests.helpers.marked_scorer import FIXTURES, evaluated, values

FILES = ("chat", "math", "code", "safety-refuse", "safety-response")


def test_a_matrix_holds_strict_wins_and_a_refused_response_wins_nothing():
    matrix = style_matrix(np.array([[1, 2, 3, 0, 2.5, 1.5], [math.nan, 1, 1, 0, math.nan, 1]]))
    assert matrix[0].tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 1]]
    assert matrix[1].tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_the_fixture_scores_as_worked_out_by_hand():
    results = evaluated("rm-bench", "rm_bench")
    assert values(results, "overall") == pytest.approx(
        {OVERALL: 7 / 12, "hard": 1 / 2, "normal": 7 / 12, "easy": 2 / 3}
    )
    assert values(results, "sections") == pytest.approx(
        # Safety pools its three rows: it is not the mean of its two parts, which would be a half.
        {"chat": 2 / 3, "math": 2 / 3, "code": 1 / 3, "safety": 2 / 3}
    )
    parts = values(results, "subsets")
    assert [parts[f"chat {level}"] for level in ("hard", "normal", "easy")] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [parts[f"math {level}"] for level in ("hard", "normal", "easy")] == pytest.approx([2 / 3] * 3)
    assert [parts[f"code {level}"] for level in ("hard", "normal", "easy")] == pytest.approx([1 / 3] * 3)


def test_files_of_domains_and_the_whole_file_score_alike():
    by_domain = evaluated("rm-bench", "rm_bench")
    whole = evaluated("rm-bench", "rm_bench/total_dataset.json")
    assert values(by_domain, "overall") == values(whole, "overall")
    assert by_domain.data["fingerprint"] == whole.data["fingerprint"]
    assert by_domain.data["left_out"] == {"files beside those of a domain: total_dataset": 1}


def test_a_missing_domain_leaves_no_overall_figure():
    results = evaluated("rm-bench", *(f"rm_bench/{name}_filtered.json" for name in FILES if name != "code"))
    assert values(results, "overall") == {}
    assert results.level("overall")[OVERALL].lacking == ("code",)
    assert set(values(results, "sections")) == {"chat", "math", "safety"}


def test_a_row_without_a_domain_in_a_file_that_names_none_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text((FIXTURES / "rm_bench/chat_filtered.json").read_text())
    with pytest.raises(DataError, match=r"row 1, field 'domain'.*safety-refuse"):
        evaluated("rm-bench", path)

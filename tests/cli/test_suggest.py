"""`armorm suggest`: rows to rate next, from a run's sums or from what a model stores."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from armorm import ArmoRM
from armorm.data.sources import Location
from armorm.heads.optimal_design import RidgePosterior
from armorm.heads.statistics import RatingStatistics
from armorm.training.suggest import suggest
from tests.helpers.commands import run

OBJECTIVE = "workshop-help"


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    """Replies to 20 prompts, three each; the first five rows are rated."""
    path = tmp_path_factory.mktemp("candidates") / "rows.jsonl"
    rows = []
    for i in range(20):
        for j, reply in enumerate(("No.", "Take the second road on the left.", f"It is {i}, as far as I know.")):
            own = {"help": 3} if len(rows) < 5 else {}
            rows.append(
                {"prompt": f"How do I reach place {i}?", "response": f"{reply} {'!' * (i % 3)}", "note": j, **own}
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(path):
    return [row.conversation() for row in Location.find(str(path)).rows()]


def test_a_file_to_rate_has_unrated_rows_of_different_prompts_and_an_empty_column(
    capsys, small_run, candidates, tmp_path
):
    output = tmp_path / "to-rate.csv"
    command = ("suggest", small_run, candidates, "--objective", OBJECTIVE, "-n", "12", "--output", output)
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["candidates"], result["rated_already"], result["exact"]) == (55, 5, True)
    removed = [entry["removed"] for entry in result["suggestions"]]
    assert removed == sorted(removed) and removed[0] > 0 and removed[-1] < 1
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == [entry["row"] for entry in result["suggestions"]]
    assert all(int(row["row"]) > 5 and row[OBJECTIVE] == "" for row in rows)
    assert len({row["prompt"] for row in rows}) == 12
    code, _, err = run(capsys, *command)
    assert code == 1 and "--force" in err


def test_a_rated_file_is_read_back_as_ratings_of_the_same_objective(capsys, small_run, candidates, tmp_path):
    output = tmp_path / "to-rate.jsonl"
    code, _, err = run(capsys, "suggest", small_run, candidates, "--objective", OBJECTIVE, "-o", output)
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 55
    output.write_text("".join(json.dumps({**row, OBJECTIVE: i % 5}) + "\n" for i, row in enumerate(rows)))
    code, _, err = run(
        capsys, "extend", small_run, "--ratings", output, "--objective", f"{OBJECTIVE}=0:4", "-o", tmp_path / "m"
    )
    assert code == 0, err
    assert f"additional ratings of: {OBJECTIVE}" in err


def test_the_stored_spectrum_gives_nearly_the_leverage_of_the_exact_sums(small_run, candidates):
    rm = ArmoRM.from_pretrained(small_run, device="cpu")
    column = rm.objectives.names.index(OBJECTIVE)
    statistics = RatingStatistics.load(small_run / "work" / "statistics.safetensors")
    place = statistics.names.index(OBJECTIVE)
    columns = next(columns for columns in statistics.row_sets() if place in columns)
    parts = [statistics.moments(columns, fold) for fold in range(statistics.folds)]
    known = rm.uncertainty
    exact = RidgePosterior.of_moments(sum(parts[1:], parts[0]), known.penalties[column], bool(known.rows.any()))
    stored = RidgePosterior.of_uncertainty(known, column)
    x = np.random.default_rng(0).normal(size=(50, len(parts[0].gram)))
    np.testing.assert_allclose(stored.leverage(x), known.leverage(x)[:, column], rtol=1e-4)
    np.testing.assert_allclose(stored.leverage(x), exact.leverage(x), rtol=0.2)
    found = suggest(rm, conversations(candidates), OBJECTIVE, 10, run=small_run)
    other = suggest(rm, conversations(candidates), OBJECTIVE, 10)
    assert found.exact and not other.exact
    assert len(set(found.rows.tolist()) & set(other.rows.tolist())) >= 7


def test_rating_the_suggested_rows_removes_more_variance_than_rating_others(small_run, candidates):
    rm = ArmoRM.from_pretrained(small_run, device="cpu")
    rows = conversations(candidates)
    found = suggest(rm, rows, OBJECTIVE, 60, run=small_run)
    assert sorted(found.rows.tolist()) == list(range(60))
    ten = found.removed[9]
    assert ten > (found.removed[-1] - found.removed[-11])  # the last ten add less than the first


def test_a_new_objective_starts_without_ratings_and_says_so(capsys, small_run, candidates):
    code, out, err = run(capsys, "suggest", small_run, candidates, "--objective", "workshop-halp", "-n", "3", "--json")
    assert code == 0, err
    assert "did you mean workshop-help?" in " ".join(err.split())
    assert len(json.loads(out)["suggestions"]) == 3


def test_records_of_argilla_with_several_raters_are_read_back_with_their_spread(
    capsys, small_run, candidates, tmp_path
):
    output = tmp_path / "records.json"
    command = ("suggest", small_run, candidates, "--objective", OBJECTIVE, "-n", "4", "--layout", "argilla")
    code, _, err = run(capsys, *command, "-o", output)
    assert code == 0, err
    records = json.loads(output.read_text())
    assert [message["role"] for message in records[0]["fields"]["messages"]] == ["user", "assistant"]
    for record in records:  # as Argilla exports them
        record["responses"] = {OBJECTIVE: [{"value": 1, "user_id": "a"}, {"value": 4, "user_id": "b"}]}
    output.write_text(json.dumps(records))
    from armorm.data.cells import rating_cell

    rows = list(Location.find(str(output)).rows())
    cell = rating_cell(rows[0].values[OBJECTIVE])
    assert (cell.value, cell.raters) == (2.5, 2) and cell.spread == pytest.approx(4.5**0.5)
    assert rows[0].conversation().prompt[0].content.startswith("How do I reach")
    code, _, err = run(capsys, *command, "-o", tmp_path / "records.csv")
    assert code == 2 and "NAME.json" in err.replace("│", " ")


def test_nothing_left_to_rate_is_one_line(capsys, small_run, tmp_path):
    path = tmp_path / "rated.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a", "help": 2}) + "\n")
    code, _, err = run(capsys, "suggest", small_run, path, "--objective", OBJECTIVE)
    assert code == 1 and "no candidate is left; all 1 are rated" in err

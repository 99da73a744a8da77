"""Inspection and the draft of a recipe: guesses are the narrowest common scale, are shown, and never taken silently."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from dataclasses import replace

import pytest

from armorm import Recipe
from armorm.data.decontamination import words
from armorm.data.inspection import ScaleGuess, inspect_set
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.training.dataset import read_training_data
from armorm.training.recipe_draft import draft_recipe, evidence
from tests.helpers.commands import exit_code
from tests.helpers.memory import peak_bytes


def table(path, header: list[str], *rows: list) -> Location:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([header, *rows])
    path.write_text(out.getvalue())
    return Location.find(path)


def rows_of(ratings: list[list]) -> list[list]:
    return [[f"q{i // 2}", f"a{i}", *values] for i, values in enumerate(ratings)]


@pytest.mark.parametrize(
    ("values", "scale", "others"),
    [
        ([0, 1, 1, 0], (0, 1), {(0, 2), (-1, 1)}),
        (["true", "false", "true"], (0, 1), {(0, 2), (-1, 1)}),
        ([1, 2, 4, 5], (1, 5), {(1, 6), (0, 5)}),
        ([2, 3, 4], (1, 4), {(0, 4), (1, 5)}),  # nobody gave a 1 or a 5: the scale of five is named too
        ([0, 4, 2], (0, 4), {(0, 5)}),
        ([1, 10, 7.5], (1, 10), {(0, 10)}),
        ([0.25, 0.5], (0, 1), {(0, 2), (-1, 1)}),
        ([88, 12, 100], (1, 100), {(0, 100)}),
        ([-3, 3, 0], (-3, 3), set()),
    ],
)
def test_the_guess_is_the_narrowest_common_scale_and_names_its_neighbours(tmp_path, values, scale, others):
    location = table(tmp_path / "a.csv", ["prompt", "response", "x"], *rows_of([[value] for value in values]))
    (guess,) = inspect_set(location).guesses
    assert (guess.low, guess.high) == scale
    assert others <= set(guess.others)
    assert (guess.rated, guess.levels) == (len(values), len(set(values)))
    assert not guess.stated


def test_columns_are_found_by_their_names_and_what_is_no_rating_is_set_aside_with_the_reason(tmp_path):
    header = ["Question", "answer", "harm", "verbosity", "user_id", "words", "same", "note"]
    rows = [[f"q{i // 2}", f"a{i}", i % 2, i % 5, i, 1000 + i, 3, "x"] for i in range(30)]
    found = inspect_set(table(tmp_path / "a.csv", header, *rows))
    assert found.columns == {"prompt": "Question", "response": "answer"}
    assert [(guess.column, guess.direction) for guess in found.guesses] == [("harm", "lower"), ("verbosity", "neutral")]
    assert found.aside == {
        "user_id": "its name is not that of a rating",
        "words": "values from 1000 to 1029 fit no common scale",
        "same": "every value is 3",
        "note": "text",
    }
    assert (found.rows, found.prompts, found.several) == (30, 15, 15)


def test_what_the_user_states_wins(tmp_path):
    location = table(tmp_path / "a.csv", ["p", "r", "x", "y"], *rows_of([[2, 1], [3, 0]]))
    found = inspect_set(
        location, columns={"prompt": "p", "response": "r"}, scales={"x": (0, 10, "lower")}, skipped=["y"]
    )
    (guess,) = found.guesses
    assert (guess.column, guess.low, guess.high, guess.direction, guess.stated) == ("x", 0, 10, "lower", True)
    with pytest.raises(DataError, match="field 'z'"):
        inspect_set(location, columns={"prompt": "p", "response": "r"}, skipped=["z"])
    with pytest.raises(DataError, match="expected 'messages', or 'prompt' and 'response'"):
        inspect_set(location)


def test_a_stated_scale_of_a_column_without_numbers_is_an_error(tmp_path):
    rows = [[f"q{i}", "a", "yes" if i % 2 else "no", None, i % 2] for i in range(6)]
    location = table(tmp_path / "a.csv", ["prompt", "response", "safe", "blank", "good"], *rows)
    with pytest.raises(DataError) as error:
        inspect_set(location, scales={"safe": (0, 1, None)})
    assert str(error.value) == f"{tmp_path}/a.csv, field 'safe': found 'no', 'yes'; expected numbers"
    with pytest.raises(DataError, match="field 'blank': found only empty cells; expected numbers"):
        inspect_set(location, scales={"blank": (0, 1, None)})
    found = inspect_set(location)
    assert [guess.column for guess in found.guesses] == ["good"]
    assert found.aside == {"safe": "text", "blank": "every cell is empty"}
    assert inspect_set(location, skipped=["good"]).aside["good"] == "skipped"


def test_a_stated_scale_of_a_column_with_much_text_is_used(tmp_path):
    rows = rows_of([["often" if i % 2 else i % 5] for i in range(12)])
    location = table(tmp_path / "a.csv", ["prompt", "response", "x"], *rows)
    assert inspect_set(location).aside == {"x": "6 of 12 cells are text"}
    (guess,) = inspect_set(location, scales={"x": (0, 4, None)}).guesses
    assert (guess.rated, guess.odd) == (6, 6)


def test_files_without_ratings_are_an_error_that_gives_the_reason_of_each_column(tmp_path, capsys):
    rows = [[f"q{i}", "a", 3, "yes"] for i in range(6)]
    table(tmp_path / "a.csv", ["prompt", "response", "quality", "safe"], *rows)
    assert exit_code("init", tmp_path / "a.csv", "-o", tmp_path / "r.yaml", "--yes") == 1
    expected = "no file has a column of ratings (quality: every value is 3; safe: text); expected at least one"
    assert expected in " ".join(capsys.readouterr().err.split())


def test_init_names_the_option_for_columns_that_it_does_not_recognise(tmp_path, capsys):
    table(tmp_path / "a.csv", ["frage", "antwort", "x"], *rows_of([[1 + i % 5] for i in range(60)]))
    assert exit_code("init", tmp_path / "a.csv", "-o", tmp_path / "r.yaml", "--yes") == 1
    assert "; name them with --column prompt=NAME --column response=NAME" in " ".join(capsys.readouterr().err.split())


def test_init_lists_the_columns_that_it_does_not_use(tmp_path, capsys):
    rows = [[f"q{i}", "a", 1 + i % 5, "yes", "2026-01-01"] for i in range(60)]
    table(tmp_path / "a.csv", ["prompt", "response", "x", "safe", "date"], *rows)
    assert exit_code("init", tmp_path / "a.csv", "-o", tmp_path / "r.yaml", "--yes") == 0
    shown = capsys.readouterr().err
    assert "not used as a rating: safe: text" in shown and "not used as a rating: date: text" in shown


def test_the_draft_is_a_recipe_that_plans(tmp_path):
    ratings = [[1 + i % 5, i % 2] for i in range(120)]
    location = table(tmp_path / "my team.csv", ["question", "answer", "helpful", "harm"], *rows_of(ratings))
    text = draft_recipe([inspect_set(location)], "mine", "armorm-tiny")
    data = read_training_data(Recipe.from_text(text))
    assert data.table.objectives.names == ["my_team-helpful", "my_team-harm"]
    assert data.table.objectives[1].direction == "lower"
    assert data.pairs
    harmful = [pair for pair in data.pairs if pair.source == "my_team-harm"]
    rated = {c.response: row for c, row in zip(data.table.conversations, data.table.ratings, strict=True)}
    assert all(rated[pair.chosen.response][1] < rated[pair.rejected.response][1] for pair in harmful)


def test_pairs_beside_ratings_are_used_instead_of_pairs_from_ratings(tmp_path):
    ratings = table(tmp_path / "a.csv", ["prompt", "response", "x"], *[[f"q{i}", "a", i % 5] for i in range(9)])
    pairs = table(tmp_path / "b.csv", ["prompt", "winner", "loser"], ["q", "good", "bad"])
    text = draft_recipe([inspect_set(ratings), inspect_set(pairs)], "mine", "armorm-tiny")
    recipe = Recipe.from_text(text)
    assert [entry.data for entry in recipe.preferences] == [str(tmp_path / "b.csv")]
    assert read_training_data(recipe).counts()["pairs_train"] + read_training_data(recipe).counts()["pairs_test"] == 1
    alone = Recipe.from_text(draft_recipe([inspect_set(ratings)], "mine", "armorm-tiny"))
    assert not alone.preferences  # one response for each prompt


def test_the_basis_of_a_scale_is_said_in_a_few_words():
    guess = ScaleGuess("score", 1, 5, "higher", 64, 1, 5, 4, others=((1, 6), (0, 5)), odd=11)
    assert evidence(guess) == "guessed from 64 ratings (4 levels, 1 to 5; 11 skipped); or 1 to 6, 0 to 5"
    guess = replace(guess, others=(), odd=0, stated=True, raters=3.0, spread=0.42)
    assert evidence(guess) == "given; 64 ratings (4 levels, 1 to 5; 3.0 raters each, sd between them 0.42)"


def test_init_writes_nothing_until_its_guesses_are_confirmed_or_stated(tmp_path, capsys, monkeypatch):
    table(tmp_path / "a.csv", ["question", "answer", "x"], *rows_of([[1 + i % 5] for i in range(60)]))
    recipe = tmp_path / "mine.yaml"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # not a terminal: nobody is asked
    assert exit_code("init", tmp_path / "a.csv", "-o", recipe, "--json") == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["scales"][0]["high"] == 5
    assert "1 to 5" in captured.err
    assert "--yes" in captured.err
    assert not recipe.exists()
    assert exit_code("init", tmp_path / "a.csv", "-o", recipe, "--scale", "x=0:10") == 0
    assert Recipe.from_yaml(recipe).ratings[0].objectives["x"].range == (0, 10)
    assert exit_code("init", tmp_path / "a.csv", "-o", recipe, "--yes") == 1
    assert "--force" in capsys.readouterr().err
    assert Recipe.from_yaml(recipe).ratings[0].objectives["x"].range == (0, 10)
    assert exit_code("init", tmp_path / "a.csv", "-o", recipe, "--yes", "--force") == 0
    assert Recipe.from_yaml(recipe).ratings[0].objectives["x"].range == (1, 5)
    assert exit_code("init", tmp_path / "a.csv", "-o", recipe, "--scale", "x=5:1") == 2


def test_a_terminal_is_asked(tmp_path, monkeypatch):
    table(tmp_path / "a.csv", ["question", "answer", "x"], *rows_of([[1 + i % 5] for i in range(60)]))
    for answer, expected in (("n\n", False), ("y\n", True)):
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", terminal)
        assert exit_code("init", tmp_path / "a.csv", "-o", tmp_path / "r.yaml") == (0 if expected else 2)
        assert (tmp_path / "r.yaml").exists() == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What's up, Doc?", "what's  up\ndoc", True),
        ("\u201cHi\u201d", '"hi"', True),
        ("2+2?", "2-2?", False),
        ("1.5", "15", False),
        ("ｆｕｌｌ", "full", True),
        ("?", "!", False),
    ],
)
def test_words_ignore_writing_and_keep_meaning(one, other, same):
    assert (words(one) == words(other)) == same


def test_a_typo_does_not_widen_a_scale_and_a_mark_does_not_delete_a_column(tmp_path):
    values = [[1 + i % 5, i % 2] for i in range(60)]
    values[7][0], values[9][0], values[11][1] = 45, "n/a", "maybe"
    found = inspect_set(table(tmp_path / "a.csv", ["prompt", "response", "x", "y"], *rows_of(values)))
    assert [(guess.column, guess.low, guess.high, guess.odd) for guess in found.guesses] == [
        ("x", 1, 5, 2),
        ("y", 0, 1, 1),
    ]
    listed = {(error.row, error.field): error.problem for error in found.rejections.cells}
    assert set(listed) == {(8, "x"), (10, "x"), (12, "y")}
    assert listed[8, "x"] == "found 45, expected a number from 1 to 5"


def test_each_value_off_the_scale_is_listed_once_with_the_first_row_that_has_it(tmp_path):
    folder, drawn = tmp_path / "ratings", random.Random(0)
    folder.mkdir()
    values = [drawn.choice([1, 2, 3, 4, 5, 45, -7, 12.5]) for _ in range(80)]
    for name, part in (("a.csv", values[:40]), ("b.csv", values[40:])):
        table(folder / name, ["prompt", "response", "x"], *rows_of([[value] for value in part]))
    found = inspect_set(Location.find(str(folder)), scales={"x": (1, 5, None)})
    expected: dict[float, str] = {}
    for row in Location.find(str(folder)).rows():
        value = float(row.values["x"])
        if not 1 <= value <= 5 and value not in expected:
            expected[value] = str(row.error(f"found {value:g}, expected a number from 1 to 5", "x"))
    assert len(expected) == 3
    assert [str(error) for error in found.rejections.cells] == list(expected.values())


def test_texts_of_rows_are_not_kept_for_a_column_of_distinct_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"{i} " * 10_000 for i in range(100)]
    rows = [{"prompt": "q", "response": text, "id": i} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    location = Location.find(str(path))
    assert len(inspect_set(location).numbers["id"]) == 100
    assert peak_bytes(lambda: inspect_set(location)) < sum(map(len, texts)) / 2


def test_a_scale_with_few_high_values_is_not_taken_for_typos(tmp_path):
    rows = rows_of([[10 * (i % 10)] for i in range(40)])
    (guess,) = inspect_set(table(tmp_path / "a.csv", ["prompt", "response", "x"], *rows)).guesses
    assert (guess.low, guess.high, guess.odd) == (0, 100, 0)


def test_init_refuses_doubtful_cells_with_strict(tmp_path, capsys):
    rows = rows_of([["n/a" if i == 5 else 1 + i % 5] for i in range(60)])
    table(tmp_path / "a.csv", ["question", "answer", "x"], *rows)
    arguments = ("init", tmp_path / "a.csv", "-o", tmp_path / "r.yaml", "--yes")
    assert exit_code(*arguments, "--strict") == 1
    assert "row 6, field 'x': found 'n/a'" in capsys.readouterr().err
    assert not (tmp_path / "r.yaml").exists()
    assert exit_code(*arguments) == 0
    assert "skipped" in capsys.readouterr().err
